"""What quantized factors cost beside float ones, on every layer of a model.

    python -m benchmarks.factor_formats MODEL --stats STATS --bits 3 --ranks 16 64

For each rank: the error in ``G ⊗ H`` of base + factors with 8, 4 and 3 bits, as a ratio to unrounded factors (mean and
largest over layers), and the error of float16 and of 4-bit factors at the same total bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.results import write
from benchmarks.run import machine
from tnc import BitsPerWeight, IntFormat, LayerStats, LowRankStage, Metric, gptq, load_stats
from tnc.decompose import Target
from tnc.models.hf import load_model
from tnc.models.layers import select_layers, weight_of
from tnc.terms import dense64

FORMATS = {"8 bits": IntFormat(8, group_size=64), "4 bits": IntFormat(4, group_size=64), "3 bits": IntFormat(3, 64)}


def layer_rows(weight: torch.Tensor, stats: LayerStats, bits: int, ranks: list[int]) -> Iterator[dict[str, Any]]:
    """One row a rank: errors of one layer relative to the base's."""
    metric = Metric.auto(stats)
    base = gptq(weight, stats, IntFormat(bits, group_size=64))
    residual = weight.double() - dense64(base)
    before = metric.norm(residual)
    for rank in ranks:
        if 4 * rank > min(weight.shape):
            continue
        stages = {"float": LowRankStage(rank, dtype=torch.float64), "float16": LowRankStage(rank, dtype=torch.float16)}
        stages |= {name: LowRankStage(rank, factor_format=format) for name, format in FORMATS.items()}
        equal = base.storage_bits + rank * sum(weight.shape) * 16
        size = BitsPerWeight(equal / weight.numel())
        stages["4 bits, bits of float16"] = LowRankStage(size, factor_format=FORMATS["4 bits"])
        target = Target(residual, weight, stats, base.storage_bits)
        errors = {name: metric.norm(residual - dense64(stage.fit(target).term)) for name, stage in stages.items()}
        yield {"rank": rank, "base": before, **errors}


def main() -> None:
    """Run over the layers, print a row a rank, write all rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--include", nargs="+", help="glob patterns of layer names; all by default")
    parser.add_argument("--out", type=Path, default=Path("results/factor_formats.json"))
    arguments = parser.parse_args()
    stats = load_stats(arguments.stats)
    layers = select_layers(load_model(arguments.model), arguments.include)
    rows = [
        {"layer": name, **row}
        for name, layer in layers.items()
        for row in layer_rows(weight_of(layer).detach(), stats[name], arguments.bits, arguments.ranks)
    ]
    for rank in sorted({row["rank"] for row in rows}):
        some = [row for row in rows if row["rank"] == rank]
        _print(rank, some)
    write(arguments.out, {"machine": machine(), "rows": rows})


def _print(rank: int, rows: list[dict[str, Any]]) -> None:
    print(f"rank {rank}, {len(rows)} layers: error of the base {mean(r['base'] / r['float'] for r in rows):.4f}")
    for name in (*FORMATS, "float16"):
        ratios = [row[name] / row["float"] for row in rows]
        print(f"  {name:<24} {mean(ratios) - 1:+.3%} over float factors, largest {max(ratios) - 1:+.3%}")
    ratios = [row["4 bits, bits of float16"] / row["float16"] for row in rows]
    print(f"  4 bits / float16 at equal bits: {mean(ratios):.4f}, largest {max(ratios):.4f}")


if __name__ == "__main__":
    main()
