"""What the planner does with layers eight times as wide, where a rank costs an eighth of the bits a weight.

    python -m benchmarks.wide_plan MODEL --calib TEXT [--stretch 8] [--layers "*.3.self_attn.*"] [--budgets 2.5 3 3.5]

Every chosen layer is planned as it is and stretched. The stretched one has random eigenvectors of H and G, their
eigenvalues interpolated to the new width, and random entries over these eigenvectors whose mean energies along both are
those of the real layer; G is scaled so that leaving the whole layer out costs the same nats. Printed is how alike the
spectra of both are in ``G ⊗ H``, and the plans of both with what choosing bits alone would have cost.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from benchmarks.planned_model import DTYPE, Start, parser
from benchmarks.results import write
from benchmarks.run import machine
from tnc import BitsPerWeight, LayerStats, Portfolio
from tnc.planning import AllowedRanks, CurveTable, Rules, input_groups, measure_layers, plan_curves

COMPENSATED = ("none", "int4-g64", "int3-g64", "int2-g64")  # where low-rank terms are tried


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
    values, vectors = _eigen(stats.gradient.second)
    half = (vectors * values.sqrt()).T @ weight.double()
    squares = _eigen(half @ stats.inputs.second.double() @ half.T)[0]
    total = squares.sum()
    return [float(squares[: max(len(squares) // part, 1)].sum() / total) for part in (64, 16, 4)]


def curves(weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats], portfolio: Portfolio) -> CurveTable:
    """The curves of some layers of a model."""
    found = dict(measure_layers(weights, stats, portfolio, dtype=DTYPE))
    groups = tuple(tuple(names) for names in input_groups(stats) if len(names) > 1)
    return CurveTable({name: found[name] for name in weights}, portfolio, groups, 0, "float16", "")


def plans(table: CurveTable, budgets: list[float]) -> list[dict[str, Any]]:
    """Nats and choices of the planned layers, and nats of choosing bits alone."""
    rows = []
    for budget in budgets:
        found = plan_curves(table, BitsPerWeight(budget), Rules(exact=True))  # few layers: hulls leave a gap
        plain = plan_curves(table, BitsPerWeight(budget), Rules(constraints=(AllowedRanks(()),), exact=True))
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
    weights = {name: weight.float() for name, weight in start.weights.items()
               if any(fnmatchcase(name, pattern) for pattern in arguments.layers)}  # fmt: skip
    narrow = {name: every[name] for name in weights}
    made = {}
    for at, (name, weight) in enumerate(weights.items()):
        given = LayerStats.from_hessian(
            narrow[name].hessian.to(arguments.device), narrow[name].gradient.second.to(arguments.device),
            tokens=narrow[name].tokens,
        )  # fmt: skip
        made[name] = stretched(weight.to(arguments.device), given, arguments.stretch, arguments.seed + at)
        shares = spectrum_shares(weight, narrow[name]), spectrum_shares(*made[name])
        print(name, tuple(weight.shape), "first 1/64, 1/16, 1/4 of the spectrum:",
              *(" ".join(f"{share:.3f}" for share in each) for each in shares), flush=True)  # fmt: skip
    portfolio = Portfolio.default(group_sizes=(64, None), factor_bits=(16, 4), shared=False)
    bases = {n: replace(base, compensated=n in COMPENSATED) for n, base in portfolio.bases.items()}
    portfolio = replace(portfolio, bases=bases, factor_ranks=tuple(arguments.ranks))
    result: dict[str, Any] = {"machine": machine(), "stretch": arguments.stretch}
    wide_weights = {name: weight for name, (weight, _) in made.items()}
    wide_stats = {name: stats for name, (_, stats) in made.items()}
    for kind, table in (("as it is", curves(weights, narrow, portfolio)),
                        ("stretched", curves(wide_weights, wide_stats, portfolio))):  # fmt: skip
        result[kind] = plans(table, arguments.budgets)
        for row in result[kind]:
            print("{0}: {budget:g} bits, {bits_per_weight:.3f} stored, {nats:.5f} nats, by bits alone "
                  "{bits_only_nats:.5f}".format(kind, **row), flush=True)  # fmt: skip
            for choice, count in Counter(row["choices"].values()).most_common():
                print(f"    {count} x {choice}")
    return result


def main() -> None:
    """Parse the arguments, run, and write everything as JSON."""
    own = parser(__doc__, out="results/wide_plan.json")
    own.add_argument("--layers", nargs="+", default=["*.3.self_attn.*"], help="patterns of layer names")
    own.add_argument("--stretch", type=int, default=8)
    own.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5])
    own.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128], help="of rounded factors")
    own.add_argument("--seed", type=int, default=0)
    arguments = own.parse_args()
    result = run(arguments)
    write(arguments.out, result)


if __name__ == "__main__":
    main()
