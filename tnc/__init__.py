"""tnc: factor the weights of language models under one currency, with certificates."""

from tnc.checkpoint import load_checkpoint, save_checkpoint
from tnc.column_space import Exact, Subspace, spectrum
from tnc.decompose import (
    RECIPES,
    BitsPerWeight,
    Decomposition,
    DenseStage,
    FactorFormats,
    InputPermutation,
    InputRotation,
    LayerReport,
    LowRankStage,
    MpoStage,
    OutputPermutation,
    OutputRotation,
    QuantizeStage,
    Rank,
    Recipe,
    RelativeError,
    compensate,
    decompose,
    recipe,
    truncated_svd,
)
from tnc.embedding import FactoredEmbedding
from tnc.errors import TNCError
from tnc.experts import unfuse_experts
from tnc.foreign import load_base
from tnc.formats import IntFormat, NumberFormat, TableFormat, number_format
from tnc.forms import compare_forms
from tnc.metric import Metric
from tnc.models.calibrate import calibrate
from tnc.models.compress import compress
from tnc.models.evaluate import Evaluation, evaluate
from tnc.models.fold import scale_model
from tnc.models.heal import HealReport, heal
from tnc.models.planning import error_curves, plan
from tnc.models.report import ModelReport
from tnc.models.rotate import rotate_model
from tnc.modules import FactoredLinear
from tnc.networks import balanced_modes, round_mpo, tt_svd
from tnc.planning import Bytes, Latency, Nats, PerplexityIncrease, Plan, Portfolio, Speedup, parse_budget, pooled_ranks
from tnc.quant import gptq, rtn
from tnc.stats import LayerStats, Moments
from tnc.stats_file import load_stats, save_stats
from tnc.terms import Dense, Diagonal, Expression, Hadamard, LowRank, Mpo, Permutation, Product, Quantized, Sum

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "BitsPerWeight",
    "Bytes",
    "Decomposition",
    "Dense",
    "DenseStage",
    "Diagonal",
    "Evaluation",
    "Exact",
    "Expression",
    "FactorFormats",
    "FactoredEmbedding",
    "FactoredLinear",
    "Hadamard",
    "HealReport",
    "InputPermutation",
    "InputRotation",
    "IntFormat",
    "Latency",
    "LayerReport",
    "LayerStats",
    "LowRank",
    "LowRankStage",
    "Metric",
    "ModelReport",
    "Moments",
    "Mpo",
    "MpoStage",
    "Nats",
    "NumberFormat",
    "OutputPermutation",
    "OutputRotation",
    "Permutation",
    "PerplexityIncrease",
    "Plan",
    "Portfolio",
    "Product",
    "QuantizeStage",
    "Quantized",
    "Rank",
    "Recipe",
    "RelativeError",
    "Speedup",
    "Subspace",
    "Sum",
    "TNCError",
    "TableFormat",
    "balanced_modes",
    "calibrate",
    "compare_forms",
    "compensate",
    "compress",
    "decompose",
    "error_curves",
    "evaluate",
    "gptq",
    "heal",
    "load_base",
    "load_checkpoint",
    "load_stats",
    "number_format",
    "parse_budget",
    "plan",
    "pooled_ranks",
    "recipe",
    "rotate_model",
    "round_mpo",
    "rtn",
    "save_checkpoint",
    "save_stats",
    "scale_model",
    "spectrum",
    "truncated_svd",
    "tt_svd",
    "unfuse_experts",
]  # fmt: skip
