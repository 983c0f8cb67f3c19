"""The einsum kernel: contract ``x`` with the factors in the cheapest order, on every device.

Products are einsum networks (`tnc.kernels.network`), cut at rotations and permutations, which are applied to ``x``
in O(n log n) (`tnc.kernels.applied`). A sum adds its terms' outputs, or rebuilds some terms
into one weight first when that takes fewer FLOPs: ``Sum(quantized, low_rank)`` of shape (m, n) does so
from about ``mn / (m + n)`` tokens on. Plans are made when the kernel is bound, one for each power of two
tokens, and equal neighbours are merged.

Weights that meet before they meet ``x`` are contracted in float32 (float64 for float64 ``x``) and rounded
once to ``x.dtype``. A contraction with ``x`` takes and gives ``x.dtype`` and accumulates as
``torch.nn.functional.linear`` does. So with bfloat16 or float16 the factors and the intermediates are
rounded once each, and a chain of ``c`` factors is within about ``2 c`` units of roundoff of the reference,
relative to the product of absolute values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import linear

from tnc.kernels.applied import applied, is_applied
from tnc.kernels.network import Operand, Piece, contraction_path, join, network, piece, rebuilt
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.terms import Expression, Product, Sum

LIMITS = tuple(2**i for i in range(17))  # tokens of the classes; the last has no upper end
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6


class Plan(Protocol):
    """What runs for one expression and one class of tokens."""

    @property
    def flops(self) -> float:
        """Operations for the tokens planned for, without dequantization, which every plan pays."""

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""

    def describe(self) -> str:
        """The plan in a few words."""


@dataclass(frozen=True)
class InTurn:
    """Plans applied one after another, the first first."""

    parts: tuple[Plan, ...]

    @property
    def flops(self) -> float:
        """Sum over the parts."""
        return sum(part.flops for part in self.parts)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        for part in self.parts:
            x = part(x, tensors)
        return x

    def describe(self) -> str:
        """The parts in order."""
        return ", then ".join(part.describe() for part in self.parts)


@dataclass(frozen=True)
class Added:
    """A sum: the ``folded`` terms share one weight and one multiplication, the ``parts`` add outputs."""

    parts: tuple[Plan, ...]
    folded: tuple[Operand, ...]
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        outputs = [part(x, tensors) for part in self.parts]
        if self.folded:
            weight = _total([operand.load(tensors, x.dtype) for operand in self.folded])
            outputs.append(linear(x, weight.to(x.dtype)))
        return _total(outputs)

    def describe(self) -> str:
        """The outputs that are added; the folded terms last, in one bracket."""
        weight = " + ".join(operand.describe() for operand in self.folded)
        return " + ".join([*(part.describe() for part in self.parts), *([f"x ({weight})"] if weight else [])])


@dataclass(frozen=True)
class Einsum:
    """The kernel bound to an expression: ``plans[i]`` serves up to ``limits[i]`` tokens, the last more."""

    limits: tuple[int, ...]
    plans: tuple[Plan, ...]

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> Einsum:
        """Plans for each of `LIMITS`, equal neighbours merged."""
        ends = [i for i, (plan, after) in enumerate(pairwise(plans)) if plan != after]
        return cls(tuple(LIMITS[i] for i in ends), tuple(plans[i] for i in [*ends, len(plans) - 1]))

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``."""
        *batch, in_features = x.shape
        tokens = prod(batch)
        y = self._plan(tokens)(x.reshape(tokens, in_features), tensors)
        return y.reshape(*batch, y.shape[-1])

    def describe(self) -> str:
        """Every plan with the tokens it serves."""
        if not self.limits:
            return self.plans[0].describe()
        heads = [*(f"up to {limit} tokens: " for limit in self.limits), "more: "]
        return "; ".join(head + plan.describe() for head, plan in zip(heads, self.plans, strict=True))

    def _plan(self, tokens: int) -> Plan:
        """The plan of the class; ``torch.compile`` guards on it, an export with open sizes takes the last."""
        for limit, plan in zip(self.limits, self.plans, strict=False):
            if statically_known_true(tokens <= limit) if _exporting() else tokens <= limit:
                return plan
        return self.plans[-1]


def _total(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def plan(operator: Expression, tokens: int) -> Plan:
    """What the kernel would run for an operator and ``tokens`` rows of ``x``; tensors may be on ``meta``."""
    return plan_for(operator, "", tokens)


def plan_for(expression: Expression, prefix: str, tokens: int) -> Plan:
    """The cheapest plan for ``tokens`` rows of ``x``."""
    if isinstance(expression, Sum):
        return _plan_sum(expression, prefix, tokens)
    if isinstance(expression, Product):
        return _plan_product(expression, prefix, tokens)
    if is_applied(expression):
        return applied(expression, prefix, tokens)
    return network(piece(expression, prefix), tokens)


def _plan_sum(expression: Sum, prefix: str, tokens: int) -> Added:
    """Fold the terms that cost more to apply than to rebuild and add, if the shared multiplication pays."""
    size = prod(expression.shape)
    plans = [plan_for(term, f"{prefix}{i}.", tokens) for i, term in enumerate(expression.terms)]
    rebuild = [_rebuild_flops(term) + size for term in expression.terms]
    fold = [i for i, plan in enumerate(plans) if rebuild[i] < plan.flops]
    rest = tuple(plan for i, plan in enumerate(plans) if i not in fold)
    apart = sum(plan.flops for plan in plans)
    multiply = (2 * tokens - 1) * size  # of k rebuilt terms only k - 1 are added
    folded = sum(plan.flops for plan in rest) + sum(rebuild[i] for i in fold) + multiply
    if len(fold) < 2 or folded >= apart:
        return Added(tuple(plans), (), apart)
    return Added(rest, tuple(rebuilt(expression.terms[i], f"{prefix}{i}.") for i in fold), folded)


def _plan_product(expression: Product, prefix: str, tokens: int) -> Plan:
    """One network where the legs fit; a sum inside is applied in its place, or rebuilt when cheaper.

    Leaves that apply themselves (`tnc.kernels.applied`) stay between the networks of their neighbours.
    """
    named = [(term, f"{prefix}{i}.") for i, term in enumerate(expression.terms)]
    in_turn = _chain([plan_for(t, p, tokens) if isinstance(t, Sum) else _link(t, p, tokens) for t, p in named], tokens)
    sums = [term for term in expression.terms if isinstance(term, Sum)]
    if not sums:
        return in_turn
    whole = _chain([_link(term, place, tokens) for term, place in named], tokens)
    return whole if whole.flops + sum(map(_rebuild_flops, sums)) < in_turn.flops else in_turn


def _link(term: Expression, prefix: str, tokens: int) -> Plan | Piece:
    return applied(term, prefix, tokens) if is_applied(term) else piece(term, prefix)


def _chain(parts: list[Plan | Piece], tokens: int) -> Plan:
    """Apply the parts of a product, last first, with neighbouring pieces joined where they can be."""
    joined: list[Plan | Piece] = []
    for part in reversed(parts):
        before = joined[-1] if joined else None
        both = join(part, before) if isinstance(part, Piece) and isinstance(before, Piece) else None
        joined = [*joined, part] if both is None else [*joined[:-1], both]
    plans = tuple(network(part, tokens) if isinstance(part, Piece) else part for part in joined)
    return plans[0] if len(plans) == 1 else InTurn(plans)


def _rebuild_flops(expression: Expression) -> float:
    """Operations of ``to_dense()``, without dequantization."""
    rows, columns = expression.shape
    if isinstance(expression, Sum):
        return sum(map(_rebuild_flops, expression.terms)) + (len(expression.terms) - 1) * rows * columns
    if isinstance(expression, Product):
        multiply = sum(2 * prod(term.shape) * columns for term in expression.terms[:-1])
        return sum(map(_rebuild_flops, expression.terms)) + multiply
    if is_applied(expression):
        return applied(expression, "", columns).flops
    leaf = piece(expression, "")
    if len(leaf.operands) == 1:
        return 0.0
    return contraction_path(leaf.labels, leaf.shapes, leaf.out + leaf.into)[1]


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _bind(operator: Expression) -> Einsum:
    return Einsum.of([plan_for(operator, "", limit) for limit in LIMITS])


register_kernel(Kernel("einsum", _serves, _bind, priority=10))
