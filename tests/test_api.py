"""The public surface: a name added or taken away is a decision, made here."""

import inspect
import subprocess
import sys

import tnc

PUBLIC = {
    "RECIPES", "BitsPerWeight", "Bytes", "Decomposition", "Dense", "DenseStage", "Diagonal", "Evaluation", "Exact",
    "Expression", "FactorFormats", "FactoredEmbedding", "FactoredLinear", "Hadamard", "HealReport", "InputPermutation",
    "InputRotation", "IntFormat", "Latency", "LayerReport", "LayerStats", "LowRank", "LowRankStage", "Metric",
    "ModelReport", "Moments", "Mpo", "MpoStage", "Nats", "NumberFormat", "OutputPermutation", "OutputRotation",
    "Permutation", "PerplexityIncrease", "Plan", "Portfolio", "Product", "QuantizeStage", "Quantized", "Rank", "Recipe",
    "RelativeError", "Speedup", "Subspace", "Sum", "TNCError", "TableFormat", "balanced_modes", "calibrate",
    "compare_forms", "compensate", "compress", "decompose", "error_curves", "evaluate", "gptq", "heal", "load_base",
    "load_checkpoint", "load_stats", "number_format", "parse_budget", "plan", "pooled_ranks", "recipe", "rotate_model",
    "round_mpo", "rtn", "save_checkpoint", "save_stats", "scale_model", "spectrum", "truncated_svd", "tt_svd",
    "unfuse_experts",
}  # fmt: skip


def test_public_names_are_pinned():
    assert set(tnc.__all__) == PUBLIC


def test_every_public_name_exists_and_is_documented():
    for name in tnc.__all__:
        thing = getattr(tnc, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name


def test_import_is_quiet_and_needs_no_extra():
    code = (
        "import sys; import tnc; "
        "print([m for m in ('transformers', 'hypothesis', 'matplotlib', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
