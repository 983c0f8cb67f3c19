"""What the parts of two-sided rounding on a trellis bring, on some layers of a model, all rotated on both sides.

    python -m benchmarks.trellis_layers MODEL --stats STATS --include '*.4.self_attn.[qv]_proj'

For each way and layer: stored bits a weight, H-error and predicted nats on held-out tokens, and seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.results import write
from benchmarks.run import machine
from tnc import IntFormat, LayerStats, QuantizeStage, load_stats
from tnc.decompose import decompose
from tnc.decompose.transforms import InputRotation, OutputRotation
from tnc.formats import TrellisFormat
from tnc.models.hf import load_model
from tnc.models.layers import select_layers, weight_of

_WIDER = {2: (14, 16), 3: (15,), 4: (16,)}  # state bits besides 12


def ways(bits: int) -> dict[str, QuantizeStage]:
    """What is compared at one width."""
    integers, diagonal = IntFormat(bits, group_size=64), TrellisFormat(bits, path="diagonal")
    wider = {states: TrellisFormat(bits, states, path="diagonal") for states in _WIDER[bits]}
    return {
        f"int{bits} g64, yaqa": QuantizeStage(integers, method="yaqa"),
        f"int{bits} g64, yaqa and 3 sweeps": QuantizeStage(integers, method="yaqa", refine=3),
        "trellis of columns, gptq": QuantizeStage(TrellisFormat(bits), method="gptq"),
        "trellis of anti-diagonals, gptq": QuantizeStage(diagonal, method="gptq"),
        "trellis of anti-diagonals, yaqa": QuantizeStage(diagonal, method="yaqa"),
        "and one sweep of refinement": QuantizeStage(diagonal, method="yaqa", refine=1),
        **{f"yaqa, {states} state bits": QuantizeStage(format, method="yaqa") for states, format in wider.items()},
    }


def layer_row(weight: Any, stats: LayerStats, stage: QuantizeStage) -> dict[str, Any]:  # noqa: ANN401
    """Bits, error, nats and seconds of one way on one layer."""
    start = time.perf_counter()
    report = decompose(weight, [stage], stats, transforms=(InputRotation(), OutputRotation())).report
    return {
        "bits": report.bits_per_weight, "heldout": report.heldout_relative_error, "nats": report.predicted_nats,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    """Run, print a row a way and layer, write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--include", nargs="+", required=True, help="glob patterns of layer names")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path, default=Path("results/trellis_layers.json"))
    arguments = parser.parse_args()
    stats = load_stats(arguments.stats)
    rows = []
    for name, layer in select_layers(load_model(arguments.model), arguments.include).items():
        for bits in arguments.bits:
            for way, stage in ways(bits).items():
                row = {"layer": name, "way": way, **layer_row(weight_of(layer).detach(), stats[name], stage)}
                rows.append(row)
                print(
                    f"{name:<36}{way:<36}{row['bits']:.3f} bits  held-out error {row['heldout']:.4f}  "
                    f"{row['nats']:.3e} nats  {row['seconds']:.1f} s",
                    flush=True,
                )
    write(arguments.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
