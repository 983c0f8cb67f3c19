"""Every way to apply a matrix product operator to some tokens, with the time that `Costs` predict for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import prod

from torch import Tensor

from tnc.kernels.costs import Costs, costs_of
from tnc.kernels.einsum import LIMITS
from tnc.kernels.mpo_ways import Keep, Path, Planned, Rebuild, Sweep
from tnc.kernels.network import contraction_path, network, piece
from tnc.terms import Mpo

MEMORY_LIMIT = 2**28
"""Bytes that the largest intermediate of a plan, or the kept weight, may take; sweep and rebuild can always be sliced
below it."""

KEPT_LEAST = 2**20
"""Entries of the smallest weight that is kept: below it no call takes long, and the choice of a way must not depend on
which operator asked first."""

Shape = tuple[int, int, int, int]
_MEMORY_IS_WORTH = 0.95  # a weight is kept where that takes less than this share of the time of every other way


def candidates(mpo: Mpo, prefix: str, tokens: int) -> list[Planned]:
    """Every way within `MEMORY_LIMIT` for ``tokens`` rows of ``x``, with its predicted time."""
    core = mpo.cores[0]
    costs = costs_of(core.device, core.dtype)
    names = tuple(prefix + name for name in mpo.tensors())
    rebuilds = [_rebuild(mpo, names, split, tokens, costs) for split in range(1, len(names))]
    found: list[Sweep | Rebuild | Path] = [*rebuilds]
    for groups in _groupings(len(names)):
        found += _sweeps(mpo, names, groups, tokens, costs)
    path = _path(mpo, prefix, tokens, costs)
    found += [] if path is None else [path]
    keep = _keep(mpo, rebuilds, min(found, key=lambda plan: plan.seconds), tokens, costs)
    return [*found] if keep is None else [*found, keep]


def _groupings(d: int) -> list[tuple[int, ...]]:
    """Every way to merge neighbouring cores that leaves at least two."""
    cuts = [c for count in range(1, d) for c in combinations(range(1, d), count)]
    return [tuple(b - a for a, b in pairwise((0, *cut, d))) for cut in cuts] or [(1,)]


def _sweeps(mpo: Mpo, names: tuple[str, ...], groups: tuple[int, ...], tokens: int, costs: Costs) -> list[Sweep]:
    """The sweep over these groups: all tokens at once, and in slices that stay in either cache."""
    shapes, seconds, flops, at = [], 0.0, 0.0, 0
    for count in groups:
        shape, cost, work = _merging([shape_of(core) for core in mpo.cores[at : at + count]], costs)
        shapes.append(shape)
        seconds, flops, at = seconds + cost, flops + work, at + count
    per_token = max(_states(shapes, 1)) * costs.itemsize
    slices = {max(min(int(room // (2 * per_token)), tokens), 1) for room in (costs.cache, costs.shared)}
    found: list[Sweep] = []
    for size in slices | {tokens}:
        if size > 1 and size * per_token > MEMORY_LIMIT:
            continue
        one = _sweep_seconds(shapes, size, costs)
        work = flops + tokens * _sweep_flops(shapes)
        cut = None if size == tokens < LIMITS[-1] else size
        found.append(Sweep(names, groups, cut, mpo.shape, seconds + one * -(-tokens // size), work))
    return found


def _states(shapes: Sequence[Shape], tokens: int) -> list[int]:
    """Entries of every state of a sweep, the input first."""
    lead, outs = tokens * prod(shape[2] for shape in shapes), 1
    sizes = [lead]
    for before, out, into, _ in reversed(shapes):
        lead, outs = lead // into, outs * out
        sizes.append(lead * before * outs)
    return sizes


def _sweep_flops(shapes: Sequence[Shape]) -> float:
    """Operations for one token."""
    results = zip(_states(shapes, 1)[1:], reversed(shapes), strict=True)
    return sum(2.0 * size * into * after for size, (_, _, into, after) in results)


def _sweep_seconds(shapes: Sequence[Shape], tokens: int, costs: Costs) -> float:
    sizes, outs, total = _states(shapes, tokens), 1, 0.0
    for (before, out, into, after), size, result in zip(reversed(shapes), sizes, sizes[1:], strict=False):
        rows, inner = before * out, into * after
        columns = result // rows if outs == 1 else outs
        count = 1 if outs == 1 else result // (rows * outs)
        total += costs.product(rows, inner, columns, count) + costs.moved(rows * inner, size, result)
        outs *= out
    return total


def _merging(shapes: Sequence[Shape], costs: Costs) -> tuple[Shape, float, float]:
    """The core that neighbours merge into, the time and the operations that takes."""
    merged, seconds, flops = shapes[0], 0.0, 0.0
    for shape in shapes[1:]:
        before, out, into, bond = merged
        _, o, i, after = shape
        rows, columns = before * out * into, o * i * after
        merged = (before, out * o, into * i, after)
        seconds += costs.product(rows, bond, columns, 1) + costs.moved(0, rows * columns)
        seconds += costs.permuted(rows * columns)
        flops += 2.0 * rows * bond * columns
    return merged, seconds, flops


def _rebuild(mpo: Mpo, names: tuple[str, ...], split: int, tokens: int, costs: Costs) -> Rebuild:
    shapes = [shape_of(core) for core in mpo.cores]
    first, seconds, flops = _merging(shapes[:split], costs)
    rest, more, work = _merging(shapes[split:], costs)
    (_, outs, into, bond), (_, out, inner, _) = first, rest
    block = into * out * inner  # entries of the weight for one value of o
    rows = max(min(int(costs.shared // (block * costs.itemsize)), outs), 1)
    inputs = into * inner
    one = costs.product(out * inner, bond, into, rows) + costs.moved(0, rows * block)
    one += costs.product(rows * out, inputs, tokens, 1) + costs.moved(
        rows * block, tokens * inputs, tokens * rows * out
    )
    seconds += more + costs.permuted(out * inner * bond) + costs.permuted(tokens * inputs)
    seconds += costs.permuted(tokens * outs * out)  # the blocks' outputs put side by side
    flops += work + 2.0 * outs * block * (bond + tokens)
    return Rebuild(names, split, rows, mpo.shape, seconds + one * outs / rows, flops)


def _keep(
    mpo: Mpo, rebuilds: Sequence[Rebuild], other: Sweep | Rebuild | Path, tokens: int, costs: Costs
) -> Keep | None:
    """The kept weight, on CPU, where it fits the limit and is worth its memory."""
    rows, columns = mpo.shape
    fits = KEPT_LEAST <= rows * columns <= MEMORY_LIMIT // costs.itemsize and mpo.cores[0].device.type in (
        "cpu",
        "meta",
    )
    seconds = costs.product(rows, columns, tokens, 1) + costs.moved(rows * columns, tokens * columns, tokens * rows)
    seconds += costs.checked(mpo.params)
    if not fits or seconds > _MEMORY_IS_WORTH * other.seconds:
        return None
    return Keep(min(rebuilds, key=lambda plan: plan.seconds), other, seconds, 2.0 * rows * columns * tokens)


def _path(mpo: Mpo, prefix: str, tokens: int, costs: Costs) -> Path | None:
    """The cheapest path priced step by step; ``None`` for padded operators and beyond the memory limit."""
    if mpo.padded:
        return None
    leaf = piece(mpo, prefix)
    labels = ["t" + leaf.into, *leaf.labels]
    sizes = {**leaf.sizes(), "t": tokens}
    steps, _ = contraction_path(tuple(labels), ((tokens, *leaf.legs(leaf.into)), *leaf.shapes), "t" + leaf.out)
    seconds, largest = 0.0, 0
    for positions in steps:
        taken = [labels[i] for i in positions]
        labels = [label for i, label in enumerate(labels) if i not in positions]
        kept = {"t", *leaf.out, *"".join(labels)}
        result = "".join(leg for leg in dict.fromkeys("".join(taken)) if leg in kept)
        inner = [leg for leg in dict.fromkeys("".join(taken)) if leg not in kept]
        entries = [prod(sizes[leg] for leg in legs) for legs in (*taken, result)]
        rows = prod(sizes[leg] for leg in result if leg in taken[0])
        columns = entries[-1] // max(rows, 1)
        seconds += costs.product(rows, prod(sizes[leg] for leg in inner), columns, 1) + costs.moved(*entries)
        moved = (size for legs, size in zip(taken, entries, strict=False) if not legs.endswith("".join(inner)))
        seconds += sum(map(costs.permuted, moved))
        labels.append(result)
        largest = max(largest, entries[-1])
        if "t" not in result and entries[-1] >= prod(mpo.shape):  # the whole weight: `Rebuild` holds less
            return None
    if largest * costs.itemsize > MEMORY_LIMIT:
        return None
    if labels != ["t" + leaf.out]:
        seconds += costs.permuted(tokens * mpo.shape[0])
    return Path(network(leaf, tokens), seconds)


def shape_of(core: Tensor) -> Shape:
    """The four sizes of a core."""
    before, out, into, after = core.shape
    return before, out, into, after
