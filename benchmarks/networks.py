"""Errors of matrix product operators on every linear layer of a model at equal bonds.

    python -m benchmarks.networks MODEL --stats STATS --jobs 2 --out results/networks.json
    python -m benchmarks.networks --table --out results/networks.json

All networks of a layer have the same modes and bond dimension, the largest that stores ``--share`` of its parameters:
plain TT-SVD, whitened, refined in G ⊗ H and in H, each from the better start in its metric; beside them the truncated
SVD of as many bits in either metric. Errors are relative in H and in G ⊗ H.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.layerwise import STATS, WEIGHTS, Row, kind, largest_first, load, measured, middle, parser, read
from tnc import BitsPerWeight, Metric, MpoStage
from tnc.decompose import truncated_svd
from tnc.decompose.rival import rival
from tnc.networks import als, tt_svd
from tnc.networks.modes import Modes
from tnc.terms import Expression, Mpo, dense64

FORMS = ("plain", "whitened", "als", "als in H", "svd", "svd in H")
RIVALS = {"als": ("svd", 1), "als in H": ("svd in H", 0)}  # at the same bits, and the metric of both


def starts(weight: Tensor, modes: tuple[Modes, Modes], rank: int, metric: Metric) -> tuple[Mpo, Mpo]:
    """Plain and whitened TT-SVD."""
    return tt_svd(weight, *modes, max_rank=rank), tt_svd(weight, *modes, max_rank=rank, metric=metric)


def refined(weight: Tensor, given: tuple[Mpo, ...], metric: Metric, sweeps: int) -> Mpo:
    """The better start after alternating least squares."""
    return als(weight, min(given, key=partial(error, metric, weight)), metric=metric, sweeps=sweeps).mpo


def error(metric: Metric, weight: Tensor, form: Expression) -> float:
    """Relative error in a metric."""
    return metric.relative(weight.double() - dense64(form), weight.double())


def layer_row(name: str, *, share: float, cores: int, sweeps: int) -> Row:
    """Errors of one layer by form, in H and in G ⊗ H."""
    weight, stats = WEIGHTS[name], STATS[name]
    full, price = Metric.full(stats), Metric.auto(stats)
    stage, shape = MpoStage(BitsPerWeight(16 * share), cores=cores), (weight.shape[0], weight.shape[1])
    rank = stage.bond(shape, torch.float16)
    given = starts(weight, stage.modes(shape), rank, price)
    start = time.perf_counter()
    mpo = refined(weight, given, price, sweeps)
    seconds = time.perf_counter() - start
    other = rival(weight, mpo, stats)
    assert other is not None
    in_h = truncated_svd(weight, other.rank, metric=full)
    made: tuple[Expression, ...] = (*given, mpo, refined(weight, given, full, sweeps), other, in_h)
    errors = {
        form: [error(metric, weight, each) for metric in (full, price)] for form, each in zip(FORMS, made, strict=True)
    }
    return {"shape": list(shape), "rank": rank, "errors": errors, "als_seconds": seconds}


def tables(layers: Mapping[str, Row]) -> Iterator[str]:
    """Markdown: errors by kind of layer, median / largest; how often refinement is above a start."""
    for metric, index in (("H", 0), ("G ⊗ H", 1)):
        yield f"\n| relative error in {metric}, median / largest | layers | bond | {' | '.join(FORMS)} |"
        yield "| --- " * (len(FORMS) + 3) + "|"
        for name in [*dict.fromkeys(map(kind, layers)), "all"]:
            chosen = [row for each, row in layers.items() if name in (kind(each), "all")]
            bonds = sorted({row["rank"] for row in chosen})
            cells = [middle([row["errors"][form][index] for row in chosen]) for form in FORMS]
            bond = f"{bonds[0]} to {bonds[-1]}" if len(bonds) > 1 else f"{bonds[0]}"
            yield f"| {name} | {len(chosen)} | {bond} | {' | '.join(cells)} |"
    for form, (rival_form, index) in RIVALS.items():
        above = [
            name for name, row in layers.items()
            if row["errors"][form][index] > (1 + 1e-9) * min(row["errors"][f][index] for f in ("plain", "whitened"))
        ]  # fmt: skip
        below = sum(row["errors"][form][index] < row["errors"][rival_form][index] for row in layers.values())
        yield f"\n{form}: above the better start in {len(above)} of {len(layers)} layers {above or ''}"
        yield f"{form}: below the truncated SVD in the same metric in {below}"


def main() -> None:
    """Measure what the file lacks and print the tables."""
    arguments = _arguments()
    if not arguments.table:
        load(arguments)
        what = partial(layer_row, share=arguments.share, cores=arguments.cores, sweeps=arguments.sweeps)
        measured(arguments, largest_first(WEIGHTS), what)
    print("\n".join(tables(read(arguments.out)["rows"])))


def _arguments() -> argparse.Namespace:
    found = parser(__doc__, "results/networks.json")
    found.add_argument("--cores", type=int, default=2)
    found.add_argument("--sweeps", type=int, default=2)
    return found.parse_args()


if __name__ == "__main__":
    main()
