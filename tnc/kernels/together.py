"""What several operators of one x compute once for all: a common transform, R x of a common right factor, one launch.

Nothing here holds tensors or remembers x; `tnc.modules.Siblings` does that for layers which a model calls one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tnc.kernels.applied import Applied
from tnc.kernels.composed import Composed
from tnc.kernels.einsum import Einsum
from tnc.kernels.parts import Part, specs_of, taken_of
from tnc.kernels.table import Bound, Changing, Repacking, Tensors, choose
from tnc.terms import Dense, Expression, LowRank, Product, Quantized, Spec, Sum

MOST = 8  # operators in one group


@runtime_checkable
class Joinable(Bound, Protocol):
    """A bound kernel that can answer for several operators in one launch."""

    def alike(self, tensors: Tensors) -> Hashable:
        """Operators of one x for which this is equal can go in one launch."""

    def joint(
        self, x: Tensor, others: Sequence[Any], tensors: Sequence[Tensors], *transforms: Sequence[tuple[Spec, Tensors]]
    ) -> list[Tensor] | None:
        """The answers of all to x (tokens, in_features); ``None`` where one launch is not the fastest way.

        ``transforms`` of x, the first to meet x first, are made in the launch by a kernel that is `Changing`.
        """

    def right(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What the right factor is stored as; nothing without one."""


@runtime_checkable
class Branching(Bound, Protocol):
    """A bound kernel of ``rest + L R`` that can take R x from outside."""

    def right(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What the right factor is stored as; nothing without one."""

    def inner(self, x: Tensor, tensors: Tensors) -> Tensor:
        """R x: (tokens, in_features) to (tokens, rank)."""

    def outer(self, x: Tensor, inner: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, out_features), given R x."""


@dataclass(frozen=True)
class Branch:
    """``rest + L R`` where L and R are read as they are stored.

    Attributes:
        rest: the other terms, if there are some.
        left, factor: L and R.
    """

    rest: Bound | None
    left: Part
    factor: Part

    def right(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What the right factor is stored as."""
        return tuple(self.factor.own(tensors).values())

    def inner(self, x: Tensor, tensors: Tensors) -> Tensor:
        """R x: (tokens, in_features) to (tokens, rank)."""
        return self.factor(x, tensors)

    def outer(self, x: Tensor, inner: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, out_features), given R x."""
        y = self.left(inner, tensors)
        return y if self.rest is None else y + self.rest(x, tensors)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features)."""
        return self.outer(x, self.inner(x, tensors), tensors)

    def describe(self) -> str:
        """What runs."""
        return "L (R x)" if self.rest is None else f"{self.rest.describe()} + L (R x)"


def branch_of(
    kernel: Einsum | Composed, operator: Expression, device: torch.device, dtype: torch.dtype
) -> Branch | None:  # fmt: skip
    """The branch of an operator that is low rank, or has one such term which its kernel reads as it is stored."""
    terms = operator.terms if isinstance(operator, Sum) else (operator,)
    places = [i for i, term in enumerate(terms) if _factors(term, "") is not None]
    if len(places) != 1:
        return None
    (i,) = places
    prefix = f"{i}." if isinstance(operator, Sum) else ""
    factors = _factors(terms[i], prefix)
    assert factors is not None, "counted above"
    left, right = (_plan(term, names, device, dtype) for term, names in factors)
    others = [k for k in range(len(terms)) if k != i]
    if not others:
        return Branch(None, left, right)
    if isinstance(kernel, Composed):
        rest = tuple(part for part in kernel.parts if all(outer != prefix for _, outer in part.names))
        alone = [part for part in kernel.parts if part.names == (("0.", prefix),) and part.row == "einsum"]
        return Branch(replace(kernel, parts=rest), left, right) if len(rest) + len(alone) == len(kernel.parts) else None
    names = tuple((f"{k}.", f"{other}.") for k, other in enumerate(others))
    return Branch(_plan(Sum(tuple(terms[k] for k in others)), names, device, dtype), left, right)


Names = tuple[tuple[str, str], ...]


def _factors(term: Expression, prefix: str) -> tuple[tuple[Expression, Names], tuple[Expression, Names]] | None:
    """L and R, each with the names of its tensors there and in the whole."""
    if isinstance(term, LowRank):
        left, right = (("matrix", f"{prefix}left"),), (("matrix", f"{prefix}right"),)
        return (Dense(term.left), left), (Dense(term.right), right)
    if isinstance(term, Product) and len(term.terms) == 2 and all(isinstance(each, Quantized) for each in term.terms):
        return (term.terms[0], (("", f"{prefix}0."),)), (term.terms[1], (("", f"{prefix}1."),))
    return None


def _plan(term: Expression, names: Names, device: torch.device, dtype: torch.dtype) -> Part:
    """The best kernel that reads the tensors as they are stored."""
    kernel, _ = choose(term, device, dtype)
    if isinstance(kernel, Repacking):
        kernel, _ = choose(term, device, dtype, backend="einsum")
    return Part("einsum", kernel, names)


@dataclass
class Started:
    """What was computed for one x: what every operator goes on from.

    Attributes:
        rows: x (tokens, in_features) behind the common transforms; ``None`` without any, so that x is not held.
        inner: R x, where the operators have one R.
        outputs: those of the launch, where there was one; each is given once.
    """

    rows: Tensor | None
    inner: Tensor | None
    outputs: list[Tensor | None] | None


@dataclass(frozen=True)
class Together:
    """How the operators of one x run: transforms in common, then one launch or one R x, then what is their own.

    Attributes:
        chains: the parts of every operator in turn.
        common: parts at the front that are transforms and the same in all.
        joint: whether the parts behind them can go in one launch.
        branches: kernels of those parts that take one R x from outside, if they can.
        limit: tokens up to which that pays.
    """

    chains: tuple[tuple[Part, ...], ...]
    common: int
    joint: bool
    branches: tuple[Branching, ...] | None
    limit: float = inf

    def start(self, x: Tensor, tensors: Sequence[Tensors], first: int = 0) -> Started:
        """What is common, for x (..., in_features).

        Args:
            x: the input of all.
            tensors: of every operator, as its kernel takes them.
            first: the operator whose tensors stand for all where they are equal.
        """
        rows = _flat(x)
        own = [chain[self.common].own(held) for chain, held in zip(self.chains, tensors, strict=True)]
        outputs: list[Tensor | None] | None = None
        ahead = self.chains[first][: self.common]
        taken = self._taken(ahead)
        for part in ahead[: len(ahead) - taken]:
            rows = part(rows, tensors[first])
        last = ahead[len(ahead) - taken :]
        if self.joint and taken:
            outputs = self._launched(rows, own, taken_of(last, tensors[first]))
        if outputs is None:
            for part in last:
                rows = part(rows, tensors[first])
            outputs = self._launched(rows, own) if self.joint else None
        inner = None
        if self.branches is not None and 0 < rows.shape[0] <= self.limit and _one(self.branches, own):
            inner = self.branches[first].inner(rows, own[first])
        return Started(rows if self.common else None, inner, outputs)

    def _taken(self, ahead: Sequence[Part]) -> int:
        """How many of the last of the common transforms go into the launch."""
        leader = self.chains[0][self.common].kernel
        return leader.takes(specs_of(ahead)) if self.joint and isinstance(leader, Changing) else 0

    def _launched(
        self, rows: Tensor, own: Sequence[Tensors], *transforms: Sequence[tuple[Spec, Tensors]]
    ) -> list[Tensor | None] | None:
        leader, *others = (chain[self.common].kernel for chain in self.chains)
        assert isinstance(leader, Joinable), "seen when it was planned"
        answers = leader.joint(rows, others, own, *transforms)
        return None if answers is None else [*answers]

    def finish(self, started: Started, x: Tensor, place: int, tensors: Tensors) -> Tensor:
        """The answer of the operator at ``place`` to the same x; takes its output of the launch away."""
        head, *tail = self.chains[place][self.common :]
        y = self._head(started, x, place, head, tensors)
        for part in tail:
            y = part(y, tensors)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _head(self, started: Started, x: Tensor, place: int, head: Part, tensors: Tensors) -> Tensor:
        if started.outputs is not None:
            y, started.outputs[place] = started.outputs[place], None
            assert y is not None, "an output is given once"
            return y
        rows = _flat(x) if started.rows is None else started.rows
        if started.inner is not None and self.branches is not None:
            return self.branches[place].outer(rows, started.inner, head.own(tensors))
        return head(rows, tensors)

    def describe(self) -> str:
        """What is done once."""
        transforms = [part.describe() for part in self.chains[0][: self.common]]
        once = [*transforms, *(["R x"] if self.branches is not None else []), *(["one launch"] if self.joint else [])]
        return f"once for all: {', '.join(once)}"


def _flat(x: Tensor) -> Tensor:
    """(tokens, in_features)."""
    *batch, columns = x.shape
    return x.reshape(prod(batch), columns)


def together(
    kernels: Sequence[Bound], tensors: Sequence[Tensors], operator: Callable[[int], Expression], device: torch.device,
    dtype: torch.dtype,
) -> Together | None:  # fmt: skip
    """How operators of one x run together, or ``None`` if nothing is common to them.

    Compares the tensors of transforms by value, which waits for the device; done once.

    Args:
        kernels: bound to each operator.
        tensors: of each, as its kernel takes them.
        operator: the expression at a place, asked for where a kernel has no layout of its own.
        device: where the tensors lie.
        dtype: expected of x.
    """
    if not 2 <= len(kernels) <= MOST:
        return None
    chains = tuple(_chain(kernel) for kernel in kernels)
    common = _common(chains, tensors)
    heads = [chain[common] for chain in chains]
    own = [head.own(held) for head, held in zip(heads, tensors, strict=True)]
    joint = _joint([head.kernel for head in heads], own)
    branches, limit = None, inf
    if not joint:
        found = [_branching(head, operator, i, device, dtype) for i, head in enumerate(heads)]
        kept = tuple(branch for branch in found if branch is not None)
        if len(kept) == len(found) and _one(kept, own):
            branches = kept
        if any(isinstance(branch, Branch) for branch in kept):
            limit = min(m * n / (m + n) for m, n in (operator(i).shape for i in range(len(kernels))))
    return Together(chains, common, joint, branches, limit) if common or joint or branches is not None else None


def _chain(kernel: Bound) -> tuple[Part, ...]:
    if isinstance(kernel, Composed) and not kernel.added:
        return kernel.parts
    return (Part("whole", kernel, (("", ""),)),)


def _common(chains: Sequence[tuple[Part, ...]], tensors: Sequence[Tensors]) -> int:
    """Transforms at the front of all chains that are the same; the last part of a chain stays its own."""
    common = 0
    while all(len(chain) > common + 1 and chain[common].row == "transform" for chain in chains):
        leaves = [chain[common].kernel for chain in chains]
        held = [chain[common].own(each) for chain, each in zip(chains, tensors, strict=True)]
        if not all(_equal(leaves[0], held[0], *other) for other in zip(leaves[1:], held[1:], strict=True)):
            break
        common += 1
    return common


def _equal(leaf: Bound, tensors: Tensors, other: Bound, others: Tensors) -> bool:
    assert isinstance(leaf, Applied) and isinstance(other, Applied), "a transform"
    return leaf.spec == other.spec and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def _joint(kernels: Sequence[Bound], tensors: Sequence[Tensors]) -> bool:
    joinable = [kernel for kernel in kernels if isinstance(kernel, Joinable)]
    if len(joinable) < len(kernels) or len({type(kernel) for kernel in kernels}) > 1:
        return False
    return len({kernel.alike(held) for kernel, held in zip(joinable, tensors, strict=True)}) == 1


def _branching(
    head: Part, operator: Callable[[int], Expression], place: int, device: torch.device, dtype: torch.dtype
) -> Branching | None:  # fmt: skip
    if isinstance(head.kernel, Branching):
        return head.kernel
    if head.row == "whole" and isinstance(head.kernel, Einsum | Composed):
        return branch_of(head.kernel, operator(place), device, dtype)
    return None


def _one(branches: Sequence[Branching], tensors: Sequence[Tensors]) -> bool:
    """Whether the right factors of all are the same stored tensors, now: a layer may have got another."""
    first, *rest = [branch.right(held) for branch, held in zip(branches, tensors, strict=True)]
    return len(first) > 0 and all(
        len(right) == len(first) and all(a is b for a, b in zip(right, first, strict=True)) for right in rest
    )
