"""What rotations bring: rounding alone, with rotated inputs, with both sides rotated, layer by layer and on text.

    python -m benchmarks.rotations MODEL --stats STATS --text TEXT --bits 3 --out results/rotations.json

Every way is run on every layer from the same statistics (`tnc calibrate` or `tnc.save_stats`); errors are those of the
tensors as stored, on held-out tokens. Certificates are left out, which take most of the time of a report.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.results import write
from benchmarks.run import machine
from tnc import InputRotation, IntFormat, LayerStats, OutputRotation, QuantizeStage, load_stats
from tnc.decompose.report import predicted_nats
from tnc.decompose.stages import Target
from tnc.decompose.transforms import Transform, apply_transforms
from tnc.metric import Metric
from tnc.models.evaluate import evaluate_many
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.layers import select_layers, weight_of
from tnc.models.text import read_text, token_windows
from tnc.terms import dense64

SIDES: dict[str, tuple[Transform, ...]] = {
    "plain": (), "inputs rotated": (InputRotation(),), "both rotated": (InputRotation(), OutputRotation()),
}  # fmt: skip


def layer(weight: torch.Tensor, stats: LayerStats, stage: QuantizeStage, transforms: tuple[Transform, ...]) -> Any:  # noqa: ANN401
    """(dense weight as stored, bits, held-out error, predicted nats) of one layer."""
    inner = apply_transforms(weight, transforms, stats)
    fitted = stage.fit(Target(inner.weight, inner.weight.to(weight.dtype), inner.stats, inner.storage_bits))
    operator = inner.wrap(fitted.term)
    dense = dense64(operator)
    error = (weight.double() - dense).float()
    heldout = stats.inputs if stats.heldout is None else stats.heldout
    size = Metric(heldout.second).relative(error, weight.float())
    return dense.float(), operator.storage_bits, size, predicted_nats(error, stats) or 0.0


def variants(arguments: argparse.Namespace, model: nn.Module, stats: Mapping[str, LayerStats]) -> list[dict[str, Any]]:
    """A row and a dense stand-in for each way."""
    layers = {name: each for name, each in select_layers(model, arguments.include).items() if name in stats}
    rows = []
    for method in arguments.methods:
        for side, transforms in SIDES.items():
            start = time.perf_counter()
            stage = QuantizeStage(IntFormat(arguments.bits, arguments.group_size), method=method)
            found = {
                name: layer(weight_of(each).detach(), stats[name], stage, transforms) for name, each in layers.items()
            }
            weights = sum(weight_of(each).numel() for each in layers.values())
            rows.append({
                "method": method, "side": side, "bits": arguments.bits,
                "bits_per_weight": sum(f[1] for f in found.values()) / weights,
                "heldout_relative_error": sum(f[2] for f in found.values()) / len(found),
                "predicted_nats": sum(f[3] for f in found.values()),
                "layers": {name: f[1:] for name, f in found.items()}, "seconds": time.perf_counter() - start,
                "dense": {name: f[0] for name, f in found.items()},
            })  # fmt: skip
            print({k: v for k, v in rows[-1].items() if k not in ("layers", "dense")}, flush=True)
    return rows


def stand_in(arguments: argparse.Namespace, dense: Mapping[str, torch.Tensor]) -> nn.Module:
    """The model with the layers' weights replaced."""
    model = load_model(arguments.model)
    for name, each in select_layers(model).items():
        if name in dense:
            weight_of(each).data.copy_(dense[name])
    return model


def main() -> None:
    """Parse the arguments, run, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["gptq", "yaqa"])
    parser.add_argument("--include", nargs="+", help="glob patterns of layer names")
    parser.add_argument("--windows", type=int, default=64, help="0 leaves the text out")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("results/rotations.json"))
    arguments = parser.parse_args()
    model, stats = load_model(arguments.model), load_stats(arguments.stats)
    rows = variants(arguments, model, stats)
    dense = {f"{row['method']} {row['side']}": row.pop("dense") for row in rows}
    sizes = {name: weight_of(each).numel() for name, each in select_layers(model, arguments.include).items()}
    found = {"machine": machine(), "weights": sizes, "rows": rows}
    write(arguments.out, found, default=str)
    if not arguments.windows:
        return
    windows = list(token_windows(load_tokenizer(arguments.model), read_text(arguments.text), arguments.context))
    models = {name: stand_in(arguments, weights) for name, weights in dense.items()}
    scores = evaluate_many(models, windows[: arguments.windows], reference=model)
    for row, score in zip(rows, scores.values(), strict=True):
        row.update(score.to_json())
        print({k: v for k, v in row.items() if k != "layers"}, flush=True)
    write(arguments.out, found, default=str)


if __name__ == "__main__":
    main()
