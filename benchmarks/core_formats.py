"""Matrix product operators with quantized cores at equal stored bits, beside float cores and truncated SVDs.

    python -m benchmarks.core_formats MODEL STATS --bits 4 --layers layers.0. --cores 2

Every form is the largest that stores at most ``--bits`` a weight. Errors are relative in H on the calibration tokens,
and in predicted nats on the held-out ones. "Plain" operators are TT-SVDs with cores rounded to the nearest code.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write
from benchmarks.run import machine
from tnc import BitsPerWeight, LayerStats, LowRankStage, MpoStage, QuantizeStage, decompose, load_stats
from tnc.decompose.stages import Stage
from tnc.formats import SUPPORTED_BITS, IntFormat
from tnc.models.hf import load_model
from tnc.models.layers import select_layers, weight_of


def forms(bits: float, cores: int) -> dict[str, Stage]:
    """Stages by name."""
    size, half = BitsPerWeight(bits), torch.float16
    eight, four = (IntFormat(width, 64, pad=True) for width in (8, 4))
    width = max(b for b in SUPPORTED_BITS if b + (16 + b) / 64 <= bits)
    return {
        "mpo fp16": MpoStage(size, cores=cores, dtype=half),
        "mpo int8": MpoStage(size, cores=cores, core_format=eight),
        "mpo int8 plain": MpoStage(size, cores=cores, core_format=eight, core_method="rtn", sweeps=0),
        "mpo int4": MpoStage(size, cores=cores, core_format=four),
        "mpo int4 plain": MpoStage(size, cores=cores, core_format=four, core_method="rtn", sweeps=0),
        "svd fp16": LowRankStage(size, dtype=half),
        "svd int8": LowRankStage(size, factor_format=eight),
        "svd int4": LowRankStage(size, factor_format=four),
        f"int{width}": QuantizeStage(IntFormat(width, 64, pad=True), method="yaqa"),
    }


def layer_row(weight: torch.Tensor, stats: LayerStats, bits: float, cores: int) -> dict[str, Any]:
    """Report of one layer by form."""
    row = {}
    for name, stage in forms(bits, cores).items():
        report = decompose(weight, (stage,), stats).report
        size = max(report.bonds) if report.bonds else report.rank
        row[name] = {
            "bits": report.bits_per_weight, "size": size, "error": report.relative_error,
            "nats": report.predicted_nats, "seconds": report.seconds,
        }  # fmt: skip
    return row


def main() -> None:
    """Measure the layers whose names hold one of ``--layers`` and print them and their sums of nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stats", type=Path)
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--layers", nargs="*", default=[""])
    parser.add_argument("--out", type=Path, default=Path("results/core_formats.json"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    stats, layers = load_stats(arguments.stats), select_layers(load_model(arguments.model))
    rows: dict[str, Any] = {}
    for name, layer in layers.items():
        if not any(part in name for part in arguments.layers):
            continue
        rows[name] = layer_row(weight_of(layer).detach(), stats[name], arguments.bits, arguments.cores)
        cells = (
            f"{form} {r['size']} {r['bits']:.2f}b {r['error']:.4f} {r['nats']:.5f}" for form, r in rows[name].items()
        )
        print(f"{name:<36} " + "  ".join(cells), flush=True)
    totals = {form: sum(row[form]["nats"] for row in rows.values()) for form in next(iter(rows.values()))}
    print(f"nats of {len(rows)} layers: " + "  ".join(f"{form} {nats:.4f}" for form, nats in totals.items()))
    write(arguments.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
