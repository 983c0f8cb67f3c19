"""What a searched order of sites brings, on every layer and every gated MLP of a model.

    python -m benchmarks.site_orders MODEL --stats STATS --jobs 2 --out results/site_orders.json
    python -m benchmarks.site_orders --table --out results/site_orders.json

Two cores at ``--share`` of the bits of float16. Rows and columns of a layer in a searched order store their indices,
which are counted; neurons of an MLP in another order cost nothing (`tnc.models.neurons`). Where the search finds a
better order both are refined in G ⊗ H, from the better of plain and whitened TT-SVD, and their errors compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from math import log2

import torch
from torch import Tensor

from benchmarks.layerwise import STATS, WEIGHTS, Row, largest_first, load, measured, parser, read
from benchmarks.networks import error, refined, starts
from tnc import BitsPerWeight, LayerStats, Metric, MpoStage
from tnc.decompose import InputPermutation, OutputPermutation
from tnc.models.neurons import NAMES, neuron_order
from tnc.networks import site_order

NEURONS = ".neurons"
_SWEEPS = 2


def layer_row(name: str, stage: MpoStage) -> Row:
    """Rows and columns of one layer: error of the search in the given order and in its own; refined errors."""
    weight, stats = WEIGHTS[name], STATS[name]
    shape = (weight.shape[0], weight.shape[1])
    given = stage.bond(shape, torch.float16)
    found = site_order(weight, given, metric=Metric.auto(stats), modes=stage.modes(shape), rounds=3)
    row: Row = {"before": found.before, "after": found.after, "start": found.start, "errors": {}}
    if found.after < found.before:
        moved = OutputPermutation(tuple(found.rows.tolist())).apply(weight, stats)
        moved = InputPermutation(tuple(found.columns.tolist())).apply(moved.weight, moved.stats)
        indices = sum(features * (8 if log2(features) <= 8 else 16) for features in shape)
        ordered = stage.bond(shape, torch.float16, spent=indices)
        row["errors"][name] = [_two_cores(weight, stats, given), _two_cores(moved.weight, moved.stats, ordered)]
    return row


def mlp_row(name: str, stage: MpoStage) -> Row:
    """The neurons of one MLP: the same, with the errors of its three layers."""
    layers = [*NAMES[0], NAMES[1]]
    weights, stats = ({each: known[f"{name}.{each}"] for each in layers} for known in (WEIGHTS, STATS))
    found = neuron_order(weights, stats, stage.rank)  # type: ignore[arg-type]
    row: Row = {"before": found.before, "after": found.after, "start": found.start, "errors": {}}
    order = tuple(found.rows.tolist())
    for each in layers if found.after < found.before else ():
        weight, known = WEIGHTS[f"{name}.{each}"], STATS[f"{name}.{each}"]
        rank = stage.bond((weight.shape[0], weight.shape[1]), torch.float16)
        moved = (InputPermutation(order) if each == NAMES[1] else OutputPermutation(order)).apply(weight, known)
        row["errors"][each] = [_two_cores(weight, known, rank), _two_cores(moved.weight, moved.stats, rank)]
    return row


def _two_cores(weight: Tensor, stats: LayerStats | None, rank: int) -> float:
    """Relative error in G ⊗ H of two refined cores."""
    assert stats is not None
    price, modes = Metric.auto(stats), MpoStage(rank).modes((weight.shape[0], weight.shape[1]))
    return error(price, weight, refined(weight, starts(weight, modes, rank, price), price, _SWEEPS))


def job(name: str, *, share: float) -> Row:
    """A layer, or a whole MLP, whose name ends in ``.neurons``."""
    stage = MpoStage(BitsPerWeight(16 * share))
    if name.endswith(NEURONS):
        return mlp_row(name.removesuffix(NEURONS), stage)
    return layer_row(name, stage)


def mlps() -> list[str]:
    """Gated MLPs of the model."""
    last = f".{NAMES[1]}"
    return [f"{name.removesuffix(last)}{NEURONS}" for name in WEIGHTS if name.endswith(last)]


def table(rows: Mapping[str, Row]) -> Iterator[str]:
    """Markdown: how often an order was found, and what it brings."""
    yield "| order of | cases | better found | search, median change | refined error in G ⊗ H lower | median change |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for label, free in (("rows and columns, stored", False), ("neurons of an MLP, free", True)):
        chosen = [row for name, row in rows.items() if name.endswith(NEURONS) == free]
        better = [row for row in chosen if row["after"] < row["before"]]
        pairs = [pair for row in better for pair in row["errors"].values()]
        search = f"{_percent([row['after'] / row['before'] for row in better])}"
        yield (
            f"| {label} | {len(chosen)} | {len(better)} | {search} | {sum(b < a for a, b in pairs)} of {len(pairs)} "
            f"layers | {_percent([b / a for a, b in pairs])} |"
        )


def _percent(ratios: list[float]) -> str:
    return f"{100 * (statistics.median(ratios) - 1):+.2f} %" if ratios else "–"


def main() -> None:
    """Measure what the file lacks and print the table."""
    arguments = parser(__doc__, "results/site_orders.json").parse_args()
    if not arguments.table:
        load(arguments)
        measured(arguments, [*mlps(), *largest_first(WEIGHTS)], partial(job, share=arguments.share))
    print("\n".join(table(read(arguments.out)["rows"])))


if __name__ == "__main__":
    main()
