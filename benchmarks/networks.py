"""Errors of matrix product operators on every linear layer of a model at equal bonds, and what orders of sites bring.

    python -m benchmarks.networks MODEL --stats STATS --jobs 2 --out results/networks.json
    python -m benchmarks.networks --table --out results/networks.json

All networks of a layer have the same modes and bond dimension, the largest that stores ``--share`` of its parameters:
plain TT-SVD, whitened, refined in G ⊗ H and in H, each from the better start in its metric; beside them the truncated
SVD of as many bits in either metric. Then the same bits with rows and columns in a searched order, whose stored indices
are counted, and for whole MLPs with their neurons in a searched order, which costs nothing. Errors are relative in H
and in G ⊗ H.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from math import log2
from typing import Any

import torch
from torch import Tensor

from benchmarks.layerwise import STATS, WEIGHTS, Row, kind, load, measured, middle, parser, read
from tnc import BitsPerWeight, LayerStats, Metric, MpoStage
from tnc.decompose import InputPermutation, OutputPermutation, truncated_svd
from tnc.decompose.rival import rival
from tnc.decompose.transforms import Transformed
from tnc.models.neurons import NAMES, neuron_order
from tnc.networks import als, site_order, tt_svd
from tnc.terms import Expression, Mpo, dense64

FORMS = ("plain", "whitened", "als", "als in H", "svd", "svd in H")
RIVALS = {"als": ("svd", 1), "als in H": ("svd in H", 0)}  # at the same bits, and the metric of both


def layer_row(name: str, *, share: float, cores: int, sweeps: int, order: bool) -> Row:
    """Errors of one layer by form."""
    weight, stats = WEIGHTS[name], STATS[name]
    full, price = Metric.full(stats), Metric.auto(stats)
    stage = MpoStage(BitsPerWeight(16 * share), cores=cores)
    outs, ins = stage.modes((weight.shape[0], weight.shape[1]))
    rank = stage.bond((weight.shape[0], weight.shape[1]), torch.float16)
    plain = tt_svd(weight, outs, ins, max_rank=rank)
    whitened = tt_svd(weight, outs, ins, max_rank=rank, metric=price)
    start = time.perf_counter()
    refined = _refined(weight, (plain, whitened), price, sweeps)
    seconds = time.perf_counter() - start
    other = rival(weight, refined, stats)
    assert other is not None
    in_h = _refined(weight, (plain, whitened), full, sweeps), truncated_svd(weight, other.rank, metric=full)
    made = (plain, whitened, refined, in_h[0], other, in_h[1])
    forms: dict[str, Expression] = dict(zip(FORMS, made, strict=True))
    errors = {form: [_error(metric, weight, each) for metric in (full, price)] for form, each in forms.items()}
    found = {"shape": list(weight.shape), "rank": rank, "errors": errors, "als_seconds": seconds}
    return {**found, "ordered": _ordered(weight, stats, share, sweeps)} if order and cores == 2 else found


def _refined(weight: Tensor, starts: tuple[Mpo, ...], metric: Metric, sweeps: int) -> Mpo:
    return als(weight, min(starts, key=partial(_error, metric, weight)), metric=metric, sweeps=sweeps).mpo


def _error(metric: Metric, weight: Tensor, form: Expression) -> float:
    return metric.relative(weight.double() - dense64(form), weight.double())


def _ordered(weight: Tensor, stats: LayerStats, share: float, sweeps: int) -> Row:
    """The searched order of one layer: error of the search before and after, and what two cores then reach."""
    shape, price = (weight.shape[0], weight.shape[1]), Metric.auto(stats)
    stage = MpoStage(BitsPerWeight(16 * share))
    modes, rank = stage.modes(shape), stage.bond(shape, torch.float16)
    found = site_order(weight, rank, metric=price, modes=modes, rounds=3)
    row = {"before": found.before, "after": found.after, "start": found.start}
    if found.after >= found.before:
        return row
    moved = OutputPermutation(tuple(found.rows.tolist())).apply(weight, stats)
    moved = InputPermutation(tuple(found.columns.tolist())).apply(moved.weight, moved.stats)
    indices = sum(features * (8 if log2(features) <= 8 else 16) for features in shape)
    return {**row, "error": _moved_error(moved, stage.bond(shape, torch.float16, spent=indices), sweeps)}


def _moved_error(moved: Transformed, rank: int, sweeps: int) -> float:
    """Relative error in G ⊗ H of two refined cores for a weight whose sites have moved."""
    assert moved.stats is not None
    weight, price = moved.weight, Metric.auto(moved.stats)
    outs, ins = MpoStage(rank).modes((weight.shape[0], weight.shape[1]))
    starts = tuple(tt_svd(weight, outs, ins, max_rank=rank, metric=metric) for metric in (None, price))
    return _error(price, weight, _refined(weight, starts, price, sweeps))


def mlp_row(name: str, *, share: float, sweeps: int) -> Row:
    """The neurons of one MLP in a searched order; errors of its layers there."""
    layers = [*NAMES[0], NAMES[1]]
    size = BitsPerWeight(16 * share)
    weights, stats = ({each: known[f"{name}.{each}"] for each in layers} for known in (WEIGHTS, STATS))
    found = neuron_order(weights, stats, size)  # type: ignore[arg-type]
    row: Row = {"before": found.before, "after": found.after, "start": found.start}
    if found.after >= found.before:
        return row
    order, errors = tuple(found.rows.tolist()), {}
    for each in layers:
        move = InputPermutation(order) if each == NAMES[1] else OutputPermutation(order)
        weight = weights[each]
        rank = MpoStage(size).bond((weight.shape[0], weight.shape[1]), torch.float16)
        errors[each] = _moved_error(move.apply(weight, stats[each]), rank, sweeps)  # type: ignore[arg-type]
    return {**row, "errors": errors}


def job(name: str, *, share: float, cores: int, sweeps: int, order: bool) -> Row:
    """A layer, or a whole MLP, whose name ends in ``neurons``."""
    if name.endswith(".neurons"):
        return mlp_row(name.removesuffix(".neurons"), share=share, sweeps=sweeps)
    return layer_row(name, share=share, cores=cores, sweeps=sweeps, order=order)


def mlps() -> list[str]:
    """Gated MLPs of the model."""
    last = f".{NAMES[1]}"
    return [f"{name.removesuffix(last)}.neurons" for name in WEIGHTS if name.endswith(last)]


def tables(rows: Mapping[str, Row]) -> Iterator[str]:
    """Markdown: errors by kind of layer, median / largest; how often refinement is above a start; the orders."""
    layers = {name: row for name, row in rows.items() if not name.endswith(".neurons")}
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
    yield from _order_table(layers, {name: row for name, row in rows.items() if name.endswith(".neurons")})


def _order_table(layers: Mapping[str, Row], groups: Mapping[str, Row]) -> Iterator[str]:
    own = {name: row for name, row in layers.items() if "ordered" in row}
    yield "\n| order of | cases | better found | search, median change | refined error in G ⊗ H lower | median change |"
    yield "| --- | --- | --- | --- | --- | --- |"
    pairs = [(r["ordered"]["error"], r["errors"]["als"][1]) for r in own.values() if "error" in r["ordered"]]
    yield _order_line("rows and columns, stored", [row["ordered"] for row in own.values()], pairs)
    pairs = [
        (error, layers[f"{name.removesuffix('neurons')}{each}"]["errors"]["als"][1])
        for name, row in groups.items() for each, error in row.get("errors", {}).items()
        if f"{name.removesuffix('neurons')}{each}" in layers
    ]  # fmt: skip
    yield _order_line("neurons of an MLP, free", list(groups.values()), pairs)


def _order_line(name: str, rows: list[dict[str, Any]], pairs: list[tuple[float, float]]) -> str:
    better = [row for row in rows if row["after"] < row["before"]]
    search = statistics.median(row["after"] / row["before"] - 1 for row in better) if better else 0.0
    lower = sum(a < b for a, b in pairs)
    change = f"{100 * statistics.median(a / b - 1 for a, b in pairs):+.2f} %" if pairs else "–"
    return (
        f"| {name} | {len(rows)} | {len(better)} | {100 * search:+.2f} % | {lower} of {len(pairs)} layers | {change} |"
    )


def main() -> None:
    """Measure what the file lacks and print the tables."""
    arguments = _arguments()
    if not arguments.table:
        load(arguments)
        what = partial(
            job, share=arguments.share, cores=arguments.cores, sweeps=arguments.sweeps, order=arguments.orders
        )  # fmt: skip
        measured(arguments, [*WEIGHTS, *(mlps() if arguments.orders else [])], what)
    print("\n".join(tables(read(arguments.out)["rows"])))


def _arguments() -> argparse.Namespace:
    found = parser(__doc__, "results/networks.json")
    found.add_argument("--cores", type=int, default=2)
    found.add_argument("--sweeps", type=int, default=2)
    found.add_argument("--no-orders", dest="orders", action="store_false", help="leave the orders of sites out")
    return found.parse_args()


if __name__ == "__main__":
    main()
