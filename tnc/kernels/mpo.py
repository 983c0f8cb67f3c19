"""The planned contraction of matrix product operators: for each class of tokens the way of least predicted time.

FLOPs mislead here: a two-core operator of bond 64 over 64 x 64 modes takes twice the FLOPs of its dense matrix, and
most of the time of an einsum goes into permutations and into intermediates that leave the cache. Three ways are
priced with a few measured constants of the device (`Costs`):

- *sweep*: core by core from the last one, in groups that are merged first where that is cheaper, a slice of tokens at
  a time so that intermediates stay in the cache. In this order the stored layout (r_prev, o, i, r_next) is the matrix
  that each step multiplies with, so no step permutes anything.
- *path*: the order of fewest FLOPs, as the ``einsum`` kernel runs it.
- *rebuild*: a block of rows of the dense weight at a time, rebuilt, used and dropped. No more than one is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tnc.kernels.costs import Costs, costs_of
from tnc.kernels.einsum import LIMITS, Added, Einsum, Plan, plan_for
from tnc.kernels.network import contraction_path, network, piece
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.terms import Expression, Mpo, Sum

MEMORY_LIMIT = 2**28
"""Bytes that the largest intermediate of a plan may take; the sweep and the rebuild can always be sliced below it."""

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sweep:
    """Cores, or merged groups of them, applied from the last to the first.

    Attributes:
        names: the cores' tensors.
        groups: numbers of neighbouring cores merged into one, in order.
        slice: tokens taken at a time; ``None`` takes all.
        features: (out_features, in_features) without padding.
        seconds: predicted for the tokens planned for.
        flops: operations for them.
    """

    names: tuple[str, ...]
    groups: tuple[int, ...]
    slice: int | None
    features: tuple[int, int]
    seconds: float = field(compare=False)
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        cores, at = [], 0
        for count in self.groups:
            cores.append(_merged([tensors[name] for name in self.names[at : at + count]], x.dtype))
            at += count
        x = pad(x, (0, prod([core.shape[2] for core in cores]) - self.features[1]))
        if self.slice is None or torch.compiler.is_compiling():
            return self._swept(x, cores)
        return torch.cat([self._swept(part, cores) for part in torch.split(x, self.slice)])

    def _swept(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        """State before core k: (tokens i_1 .. i_k-1, i_k r_k, o_k+1 .. o_d)."""
        tokens, outs = x.shape[0], 1
        lead, state = tokens * x.shape[1], x
        for core in reversed(cores):
            before, out, into, after = core.shape
            lead = lead // into
            matrix = core.reshape(before * out, into * after)
            if outs == 1:  # one product of two matrices, not a matrix-vector product for each row
                state = linear(state.reshape(lead, into * after), matrix)
            else:
                state = torch.matmul(matrix, state.reshape(lead, into * after, outs))
            outs *= out
        return state.reshape(tokens, outs)[:, : self.features[0]]

    def describe(self) -> str:
        """The order, the groups, the slice."""
        merged = "" if max(self.groups) == 1 else f" merged {'+'.join(map(str, self.groups))}"
        part = "" if self.slice is None else f", {self.slice} tokens at a time"
        return f"sweep over {len(self.names)} cores{merged}, no permutation{part}"


@dataclass(frozen=True)
class Rebuild:
    """Rows of the dense weight rebuilt a block at a time, used and dropped.

    Attributes:
        names: the cores' tensors.
        rows: values of o_1 in a block.
        features: (out_features, in_features) without padding.
        seconds: predicted for the tokens planned for.
        flops: operations for them.
    """

    names: tuple[str, ...]
    rows: int
    features: tuple[int, int]
    seconds: float = field(compare=False)
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``; the weight is rounded once."""
        wide = torch.promote_types(x.dtype, torch.float32)
        first, *others = (tensors[name].to(wide) for name in self.names)
        x = pad(x, (0, first.shape[2] * prod([core.shape[2] for core in others]) - self.features[1]))
        rest = _merged(others, wide)
        after, out, into, _ = rest.shape
        outputs = []
        for block in torch.split(first[0], self.rows):  # (rows, i_1, r_1)
            merged = block.reshape(-1, after) @ rest.reshape(after, out * into)
            legs = merged.reshape(len(block), first.shape[2], out, into).transpose(1, 2)
            weight = legs.to(x.dtype).reshape(len(block) * out, first.shape[2] * into)
            outputs.append(linear(x, weight))
        return torch.cat(outputs, dim=-1)[:, : self.features[0]]

    def describe(self) -> str:
        """What is rebuilt at a time."""
        return f"rebuilds the weight in blocks of {self.rows} values of the first output mode"


@dataclass(frozen=True)
class Path:
    """The order of fewest FLOPs."""

    inner: Plan
    seconds: float = field(compare=False)

    @property
    def flops(self) -> float:
        """Operations for the tokens planned for."""
        return self.inner.flops

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        return self.inner(x, tensors)

    def describe(self) -> str:
        """The contractions in order."""
        return self.inner.describe()


Planned = Sweep | Rebuild | Path


def plan_mpo(mpo: Mpo, prefix: str, tokens: int) -> Planned:
    """The way predicted to take the least time for ``tokens`` rows of ``x`` in the dtype of the cores."""
    return min(candidates(mpo, prefix, tokens), key=lambda plan: plan.seconds)


def candidates(mpo: Mpo, prefix: str, tokens: int) -> list[Planned]:
    """Every way within `MEMORY_LIMIT`, with its predicted time."""
    core = mpo.cores[0]
    costs = costs_of(core.device, core.dtype)
    names = tuple(prefix + name for name in mpo.tensors())
    found: list[Planned] = [_rebuild(mpo, names, tokens, costs)]
    for groups in _groupings(len(names)):
        found += _sweeps(mpo, names, groups, tokens, costs)
    path = _path(mpo, prefix, tokens, costs)
    return found if path is None else [*found, path]


def _groupings(d: int) -> list[tuple[int, ...]]:
    """Every way to merge neighbouring cores that leaves at least two."""
    cuts = [c for count in range(1, d) for c in combinations(range(1, d), count)]
    return [tuple(b - a for a, b in pairwise((0, *cut, d))) for cut in cuts] or [(1,)]


def _sweeps(mpo: Mpo, names: tuple[str, ...], groups: tuple[int, ...], tokens: int, costs: Costs) -> list[Planned]:
    """The sweep over these groups: all tokens at once, and in slices that stay in the cache."""
    shapes, seconds, flops, at = [], 0.0, 0.0, 0
    for count in groups:
        shape, cost, work = _merging([_shape(core) for core in mpo.cores[at : at + count]], costs)
        shapes.append(shape)
        seconds, flops, at = seconds + cost, flops + work, at + count
    per_token = max(_states(shapes, 1)) * costs.itemsize
    slices = {tokens, max(min(int(costs.cache // (2 * per_token)), tokens), 1)}
    found: list[Planned] = []
    for size in slices:
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
        seconds += costs.product(rows, bond, columns, 1) + costs.permuted(rows * columns)
        flops += 2.0 * rows * bond * columns
    return merged, seconds, flops


def _rebuild(mpo: Mpo, names: tuple[str, ...], tokens: int, costs: Costs) -> Rebuild:
    first = _shape(mpo.cores[0])
    rest, seconds, flops = _merging([_shape(core) for core in mpo.cores[1:]], costs)
    after, out, into, _ = rest
    block = first[2] * out * into  # entries of the weight for one value of o_1
    rows = max(min(int(costs.cache // (2 * block * costs.itemsize)), first[1]), 1)
    count, inputs = -(-first[1] // rows), first[2] * into
    one = costs.product(rows * first[2], after, out * into, 1) + costs.permuted(rows * block)
    one += costs.product(rows * out, inputs, tokens, 1)
    one += costs.moved(rows * block, tokens * inputs, tokens * rows * out)
    work = flops + 2.0 * first[1] * block * (after + tokens)
    return Rebuild(names, rows, mpo.shape, seconds + count * one, work)


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
        seconds += sum(costs.permuted(size) for size in entries[:-1] if size > min(entries[:-1]))
        labels.append(result)
        largest = max(largest, entries[-1])
        if "t" not in result and entries[-1] >= prod(mpo.shape):  # the whole weight: `Rebuild` holds less
            return None
    if largest * costs.itemsize > MEMORY_LIMIT:
        return None
    return Path(network(leaf, tokens), seconds)


def _shape(core: Tensor) -> Shape:
    before, out, into, after = core.shape
    return before, out, into, after


def _merged(cores: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Neighbouring cores as one (r_prev, o.., i.., r_next) in ``dtype``."""
    merged = cores[0].to(dtype)
    for core in cores[1:]:
        before, out, into, bond = merged.shape
        _, o, i, after = core.shape
        pairs = (merged.reshape(-1, bond) @ core.to(dtype).reshape(bond, -1)).reshape(before, out, into, o, i, after)
        merged = pairs.transpose(2, 3).reshape(before, out * o, into * i, after)
    return merged


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    terms = operator.terms if isinstance(operator, Sum) else (operator,)
    if not any(_is_planned(term) for term in terms):
        return "plans matrix product operators of two cores or more, alone or as terms of a sum"
    return None


def _is_planned(term: Expression) -> TypeGuard[Mpo]:
    return isinstance(term, Mpo) and len(term.cores) > 1 and 0 not in term.ranks


def _plan(operator: Expression, tokens: int) -> Plan:
    if isinstance(operator, Mpo):
        return plan_mpo(operator, "", tokens)
    assert isinstance(operator, Sum)
    named = [(term, f"{i}.") for i, term in enumerate(operator.terms)]
    parts = tuple(plan_mpo(t, p, tokens) if _is_planned(t) else plan_for(t, p, tokens) for t, p in named)
    return Added(parts, (), sum(part.flops for part in parts))


def _bind(operator: Expression) -> Einsum:
    return Einsum.of([_plan(operator, limit) for limit in LIMITS])


register_kernel(Kernel("mpo", _serves, _bind, priority=15))
