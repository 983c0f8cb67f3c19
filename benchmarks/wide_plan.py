"""What the planner does with layers eight times as wide, where a rank costs an eighth of the bits a weight.

    python -m benchmarks.wide_plan MODEL --calib TEXT [--stretch 8] [--layers "*.3.self_attn.*"] [--budgets 2.5 3 3.5 4]

Every chosen layer is planned as it is and stretched. The stretched one has random eigenvectors of H and G, their
eigenvalues interpolated to the new width, and random entries over these eigenvectors whose mean energies along both are
those of the real layer; G is scaled so that leaving the whole layer out costs the same nats. Printed is how alike the
spectra of both are in ``G ⊗ H``, and the plans of both with what choosing bits alone would have cost. Curves are kept:
layers can be measured by several runs, and be planned together by one more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.planned_model import DTYPE, Start, parser
from benchmarks.results import write
from benchmarks.run import machine
from tnc import BitsPerWeight, LayerStats, Portfolio
from tnc.planning import AllowedRanks, CurveTable, Rules, measure_curves, plan_curves

KINDS = ("as it is", "stretched")


def stretched(weight: Tensor, stats: LayerStats, factor: int, seed: int) -> tuple[Tensor, LayerStats]:
    """A random layer ``factor`` times as wide and as tall, with the spectra of this one, and its statistics."""
    assert stats.gradient is not None, "stretching needs gradients"
    random = torch.Generator(weight.device).manual_seed(seed)
    inputs, across = _eigen(stats.inputs.second)
    outputs, down = _eigen(stats.gradient.second)
    energy = (down.T @ weight.double() @ across) ** 2
    rows, columns = energy.mean(1), energy.mean(0) / energy.mean()
    hessian, right = _random_moment(inputs, factor, random)
    gradient, left = _random_moment(outputs, factor, random)
    shape = (len(gradient), len(hessian))
    entries = torch.randn(shape, generator=random, device=weight.device, dtype=torch.float64)
    entries *= rows.repeat_interleave(factor).sqrt()[:, None] * columns.repeat_interleave(factor).sqrt()
    wide = left @ entries @ right.T / factor**0.5
    now = (wide * (gradient @ wide @ hessian)).sum()
    before = (weight.double() * (stats.gradient.second.double() @ weight.double() @ stats.inputs.second.double())).sum()
    moments = LayerStats.from_hessian(hessian, gradient * (before / now), tokens=stats.tokens)
    return wide.to(weight.dtype), moments


def _eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors."""
    values, vectors = torch.linalg.eigh(moment.double())
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _random_moment(values: Tensor, factor: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A moment of ``factor`` times the size with these eigenvalues, interpolated, and its random eigenvectors."""
    size = len(values) * factor
    place = (torch.arange(size, device=values.device, dtype=torch.float64) + 0.5) / factor - 0.5
    low = place.floor().clamp(0, len(values) - 1).long()
    high = (low + 1).clamp_max(len(values) - 1)
    share = (place - low).clamp(0, 1)
    wide = values[low] * (1 - share) + values[high] * share
    vectors = torch.linalg.qr(torch.randn((size, size), generator=random, device=values.device, dtype=torch.float64)).Q
    return (vectors * wide) @ vectors.T, vectors


def spectrum_shares(weight: Tensor, stats: LayerStats) -> list[float]:
    """Share of the nats in the first 1/64, 1/16, 1/4 of the singular values in ``G ⊗ H``."""
    assert stats.gradient is not None, "as above"
    matrix, outer, inner = weight.double(), stats.gradient.second.double(), stats.inputs.second.double()
    if matrix.shape[0] > matrix.shape[1]:  # the smaller side has all the singular values
        matrix, outer, inner = matrix.T, inner, outer
    values, vectors = _eigen(outer)
    half = (vectors * values.sqrt()).T @ matrix
    squares = _eigen(half @ inner @ half.T)[0]
    total = squares.sum()
    return [float(squares[: max(len(squares) // part, 1)].sum() / total) for part in (64, 16, 4)]


def measured(arguments: argparse.Namespace, weight: Tensor, stats: LayerStats, at: int, kept: Path) -> CurveTable:
    """Curves of a layer as it is and stretched, named by `KINDS`; from their file if it is there."""
    asked = f"{arguments.model.name} {arguments.stretch} {arguments.seed} {arguments.ranks} {arguments.groups}"
    if kept.exists():
        return CurveTable.load(kept, fingerprint=asked)
    portfolio, layers = portfolio_of(arguments), {}
    weight = weight.to(arguments.device)
    assert stats.gradient is not None, "as above"
    moments = (each.to(arguments.device) for each in (stats.hessian, stats.gradient.second))
    real = weight, LayerStats.from_hessian(*moments, tokens=stats.tokens)
    for kind, given in zip(KINDS, (real, stretched(*real, arguments.stretch, arguments.seed + at)), strict=True):
        shares = " ".join(f"{share:.3f}" for share in spectrum_shares(*given))
        note = f"{tuple(given[0].shape)}: the first 1/64, 1/16 and 1/4 of the spectrum have {shares} of the nats"
        layers[kind] = replace(measure_curves(*given, portfolio, dtype=DTYPE), notes=(note,))
        print(f"{kept.stem} {note}", flush=True)
    found = CurveTable(layers, portfolio, (), 0, "float16", asked)
    found.save(kept)
    return found


def portfolio_of(arguments: argparse.Namespace) -> Portfolio:
    """The default one with factors of 16 and 4 bits, low rank on the integers of one group size alone."""
    found = Portfolio.default(group_sizes=(*arguments.groups, None), factor_bits=(16, 4), shared=False)
    compensated = {"none", *(f"int{bits}-g{arguments.groups[0]}" for bits in (4, 3, 2))}
    bases = {name: replace(base, compensated=name in compensated) for name, base in found.bases.items()}
    return replace(found, bases=bases, factor_ranks=tuple(arguments.ranks))


def plans(table: CurveTable, budgets: list[float]) -> list[dict[str, Any]]:
    """Nats and choices of the planned layers, and nats of choosing bits alone."""
    rows = []
    for budget in budgets:
        found = plan_curves(table, BitsPerWeight(budget))
        plain = plan_curves(table, BitsPerWeight(budget), Rules(constraints=(AllowedRanks(()),)))
        rows.append({
            "budget": budget, "bits_per_weight": found.bits_per_weight, "nats": found.predicted_nats,
            "bits_only_nats": plain.predicted_nats,
            "choices": {name: layer.choice.describe() for name, layer in found.layers.items()},
            "with_rank": sum(layer.choice.rank > 0 for layer in found.layers.values()),
        })  # fmt: skip
    return rows


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stretch, measure, plan and print."""
    start = Start.of(arguments)
    every = start.statistics(arguments, arguments.seed)
    names = [n for n in start.weights if any(fnmatchcase(n, pattern) for pattern in arguments.layers)]
    arguments.kept.mkdir(parents=True, exist_ok=True)
    tables = {
        name: measured(arguments, start.weights[name].float(), every[name], list(start.weights).index(name),
                       arguments.kept / f"{name}.safetensors")
        for name in names
    }  # fmt: skip
    result: dict[str, Any] = {"machine": machine(), "stretch": arguments.stretch}
    for kind in KINDS:
        layers = {name: table.layers[kind] for name, table in tables.items()}
        result[kind] = plans(CurveTable(layers, portfolio_of(arguments), (), 0, "float16", ""), arguments.budgets)
        result[f"{kind}, notes"] = {name: layer.notes for name, layer in layers.items()}
        for row in result[kind]:
            print("{0}: {budget:g} bits, {bits_per_weight:.3f} stored, {nats:.5f} nats, by bits alone "
                  "{bits_only_nats:.5f}".format(kind, **row), flush=True)  # fmt: skip
    write(arguments.out, result)
    print("\n".join(side_by_side(result)))
    return result


def side_by_side(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table: budget and layer, the choice for the real layer and for the stretched one."""
    yield "| budget | layer | as it is | stretched |"
    yield "| --- | --- | --- | --- |"
    for now, wide in zip(result["as it is"], result["stretched"], strict=True):
        for name, choice in now["choices"].items():
            yield f"| {now['budget']:g} | {name.split('.')[-1]} | {choice} | {wide['choices'][name]} |"


def main() -> None:
    """Parse the arguments, run, and write everything as JSON."""
    own = parser(__doc__, out="results/wide_plan.json")
    own.add_argument("--layers", nargs="+", default=["*.3.self_attn.*"], help="patterns of layer names")
    own.add_argument("--stretch", type=int, default=8)
    own.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0])
    own.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="of rounded factors")
    own.add_argument("--groups", type=int, nargs="+", default=[64], help="group sizes; low rank is tried on the first")
    own.add_argument("--kept", type=Path, default=Path("results/wide_curves"), help="folder that keeps the curves")
    own.add_argument("--seed", type=int, default=0)
    run(own.parse_args())


if __name__ == "__main__":
    main()
