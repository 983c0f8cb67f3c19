"""Healing: matrix product operators against truncated SVD at the same bits, before and after the same fine-tune.

    python -m benchmarks.heal MODEL --calib TEXT --train TEXT --text TEXT --out results/heal.json

Every variant stores ``--share`` of the bits of the dense linears in float16. Progress goes to standard output, and
the JSON file is written after every variant, so that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.run import machine
from tnc import BitsPerWeight, LayerStats, Metric, ModelReport, Recipe, calibrate, compress, heal, load_stats
from tnc.decompose import LowRankStage, MpoStage, Stage
from tnc.decompose.forms import FormStage, blast
from tnc.models.evaluate import evaluate
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import calibration_batches, read_text, token_windows


def variants(share: float, only: str) -> list[Recipe]:
    """Truncated SVD, MPO and BLAST, plain and in the metric, at ``16 * share`` bits per weight."""
    size = BitsPerWeight(16 * share)
    stages: dict[str, Stage] = {
        "svd, Frobenius": LowRankStage(size, metric=Metric.identity),
        "svd, G ⊗ H": LowRankStage(size),
        "mpo 2 cores, Frobenius": MpoStage(size, metric=Metric.identity, sweeps=0),
        "mpo 2 cores, G ⊗ H": MpoStage(size, sweeps=1),
        "blast 8×8, G ⊗ H": FormStage(_blast, size),
    }
    found = [Recipe(name, (stage,)) for name, stage in stages.items()]
    found.append(Recipe("svd, G ⊗ H, pooled", (LowRankStage(size, metric=Metric.auto),), pooled=size))
    return [each for each in found if re.search(only, each.name)]


def _blast(weight: torch.Tensor, rank: Any, /, **options: Any) -> Any:  # noqa: ANN401
    rows, columns = (max(d for d in range(1, 9) if size % d == 0) for size in weight.shape)
    return blast(weight, rank, blocks=(rows, columns), sweeps=3, **options)


def run(arguments: argparse.Namespace) -> None:
    """Compress, score, heal and score again, variant by variant."""
    device, start = torch.device(arguments.device), time.perf_counter()
    dense = load_model(arguments.model, device=device)
    tokenizer = load_tokenizer(arguments.model)
    stats = _stats(arguments, dense, tokenizer)
    train = calibration_batches(
        tokenizer, read_text(arguments.train), context=arguments.context, sequences=arguments.sequences,
        batch_size=arguments.batch, seed=arguments.seed,
    )  # fmt: skip
    windows = list(token_windows(tokenizer, read_text(arguments.text), arguments.context))[: arguments.windows]
    base = evaluate(dense, windows)
    print(f"dense: perplexity {base.perplexity:.2f}", flush=True)
    result: dict[str, Any] = {
        "machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}, "dense": base.to_json(),
        "rows": [],
    }  # fmt: skip
    for each in variants(arguments.share, arguments.only):
        result["rows"].append(_variant(each, dense, stats, train, windows, arguments))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{time.perf_counter() - start:.0f} s in all; {arguments.out}", flush=True)


def _stats(arguments: argparse.Namespace, dense: nn.Module, tokenizer: Any) -> dict[str, LayerStats]:  # noqa: ANN401
    if arguments.stats is not None:
        return load_stats(arguments.stats)
    batches = calibration_batches(
        tokenizer, read_text(arguments.calib), context=arguments.context, sequences=128, seed=arguments.seed
    )  # fmt: skip
    return calibrate(dense, [batch.to(arguments.device) for batch in batches], seed=arguments.seed)


def _variant(
    each: Recipe, dense: nn.Module, stats: dict[str, LayerStats], train: list[torch.Tensor], windows: list[Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One row: bits, predicted nats, scores before and after, seconds."""
    start = time.perf_counter()
    small = compress(dense.cpu(), each, stats=stats, dtype=torch.float16).to(arguments.device)
    dense.to(arguments.device)
    fitted, fields = time.perf_counter() - start, ModelReport.of(small).to_json()
    before = evaluate(small, windows, reference=dense)
    print(f"{each.name:<26} {fields['bits_per_weight']:.3f} b, {fitted:.0f} s, before: perplexity "
          f"{before.perplexity:9.2f} KL {before.kl:.4f}", flush=True)  # fmt: skip
    report = heal(
        small, train, teacher=dense, block_steps=arguments.block_steps, logit_steps=arguments.logit_steps,
        learning_rate=arguments.rate, seed=arguments.seed,
        autocast=torch.bfloat16 if arguments.device != "cpu" else None,
    )  # fmt: skip
    after = evaluate(small, windows, reference=dense)
    print(f"{'':<26} after {report.seconds:.0f} s: perplexity {after.perplexity:9.2f} KL {after.kl:.4f}", flush=True)
    fields.pop("layers")
    return {
        **fields, "recipe": each.name, "fit_seconds": fitted, "before": before.to_json(), "after": after.to_json(),
        "heal": report.to_json(),
    }  # fmt: skip


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", required=True, help="text to heal on")
    parser.add_argument("--text", required=True, help="held-out text to score")
    parser.add_argument("--calib", help="calibration text, unless --stats is given")
    parser.add_argument("--stats", type=Path, help="statistics file")
    parser.add_argument("--share", type=float, default=0.5, help="of the dense bits")
    parser.add_argument("--only", default="", help="pattern of variant names")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=512, help="training windows")
    parser.add_argument("--batch", type=int, default=16, help="training windows a step")
    parser.add_argument("--windows", type=int, default=None, help="scored windows; default all")
    parser.add_argument("--block-steps", type=int, default=150)
    parser.add_argument("--logit-steps", type=int, default=350)
    parser.add_argument("--rate", type=float, default=0.02, help="relative to the size of each factor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/heal.json"))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
