"""Every number format against the rate-distortion limit: squared error on Gaussian, Laplacian and real entries.

python -m benchmarks.formats --model MODEL --out results/formats.json

``error`` is the squared error over the energy of the entries, ``ratio`` that error over ``2**(-2 R)``, the least that
any code of R bits an entry leaves of Gaussian entries; R counts everything stored. For other distributions of the same
variance the limit lies lower, so the ratio is no distance from what is possible there. Every weight is rounded to
nearest with the format's own clip search, without statistics. ``rotated`` are the model's entries after a random
orthogonal rotation of rows and columns, which makes them near Gaussian.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import write
from benchmarks.run import machine
from tnc import NumberFormat, number_format, rtn
from tnc.formats import TrellisFormat
from tnc.models.hf import load_model
from tnc.models.layers import select_layers, weight_of
from tnc.terms import dense64

ROWS, COLUMNS = 256, 512


def formats() -> Iterator[NumberFormat]:
    """The formats of the table, by falling rate within a family."""
    for bits in (8, 6, 5, 4, 3, 2):
        yield number_format(f"int{bits}", group_size=64)
    yield from (number_format("int4", group_size=g, symmetric=True) for g in (64, 128, None))
    yield number_format("int4", group_size=64, symmetric=True, scale="uint8")
    for name in ("nf4", "nf3", "fp4", "ternary"):
        yield number_format(name, group_size=64)
    yield number_format("nf4", group_size=64, scale="uint8")
    for name in ("mxfp4", "nvfp4", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3_tensor", "fp8_e4m3_block"):
        yield number_format(name)
    yield from (number_format(f"trellis{bits}") for bits in (4, 3, 2))
    yield TrellisFormat(2, code="3inst")


def random_weight(kind: str, generator: torch.Generator) -> Tensor:
    """(256, 512) independent entries of variance 1."""
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    if kind == "gaussian":
        return normal
    chi = torch.empty(ROWS, COLUMNS).exponential_(1.0, generator=generator)  # a Gaussian of exponential variance
    return normal * chi.sqrt()


def real_weights(model: Path, rows: int) -> dict[str, Tensor]:
    """Some layers of a model, the first rows of each, float32."""
    layers = select_layers(load_model(model))
    names = [*layers][:: max(1, len(layers) // 4)][:4]
    return {name: weight_of(layers[name]).detach().float()[:rows] for name in names}


def rotated(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Rows and columns turned by random orthogonal matrices."""
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in weight.shape)
    return left @ weight @ right


def measured(format: NumberFormat, weights: list[Tensor]) -> dict[str, float]:
    """Mean over weights of bits an entry, relative squared error, and its ratio to the limit."""
    rates, errors, ratios = [], [], []
    for weight in weights:
        term = rtn(weight, format)
        rates.append(term.storage_bits / weight.numel())
        errors.append(float((weight.double() - dense64(term)).square().sum() / weight.double().square().sum()))
        ratios.append(errors[-1] * 4 ** rates[-1])
    return {name: sum(v) / len(v) for name, v in (("bits", rates), ("error", errors), ("ratio", ratios))}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a format."""
    generator = torch.Generator().manual_seed(arguments.seed)
    data = {kind: [random_weight(kind, generator)] for kind in ("gaussian", "laplacian")}
    if arguments.model is not None:
        data["real"] = [*real_weights(arguments.model, arguments.rows).values()]
        data["rotated"] = [rotated(w, generator) for w in data["real"]]
    rows = []
    for format in formats():
        start = time.perf_counter()
        found = {kind: measured(_fitting(format, weights[0]), weights) for kind, weights in data.items()}
        rows.append({"format": format.describe(), **found, "seconds": time.perf_counter() - start})
        cells = "  ".join(f"{kind} {v['bits']:.3f} b {v['error']:.3e} x{v['ratio']:.2f}" for kind, v in found.items())
        print(f"{rows[-1]['format']:<30} {cells}", flush=True)
    return rows


def _fitting(format: NumberFormat, weight: Tensor) -> NumberFormat:
    """The format with padding where its group does not divide."""
    group = format.group_size
    return replace(format, pad=True) if group and format.group_rows == 1 and weight.shape[1] % group else format  # type: ignore[type-var]


def main() -> None:
    """Parse the arguments, run, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model for the real entries")
    parser.add_argument("--rows", type=int, default=256, help="rows of each layer that are used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/formats.json"))
    arguments = parser.parse_args()
    rows = run(arguments)
    write(arguments.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
