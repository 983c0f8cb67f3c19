"""The inner problem of a wrapped operator, read off its structure: the inverse of what transforms do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.metric import Metric
from tnc.terms import Diagonal, Expression, Hadamard, Permutation, Product, Sum

_Orthogonal = Hadamard | Permutation


@dataclass(frozen=True, eq=False)
class Peeled:
    """An inner operator and the weight and metric in which its error is that of the whole.

    Attributes:
        weight: ``L⁻¹ W R⁻¹``, float64.
        operator: the operator between the wrappings ``L`` and ``R``.
        metric: H and G in the inner bases.
    """

    weight: Tensor
    operator: Expression
    metric: Metric


def core(operator: Expression) -> Expression:
    """What is left of a product when rotations, permutations and scalings at its ends are taken away."""
    if not isinstance(operator, Product):
        return operator
    first, last = _ends(operator)
    inner = operator.terms[first:last]
    return inner[0] if len(inner) == 1 else Product(inner)


def leaves(operator: Expression) -> tuple[Expression, ...]:
    """The terms of the sum inside the wrappings, or the one expression there."""
    inner = core(operator)
    return inner.terms if isinstance(inner, Sum) else (inner,)


def peel(weight: Tensor, operator: Expression, metric: Metric) -> Peeled | None:
    """The inner problem with ``||E'|| = ||E||`` for every inner error ``E'``; ``None`` where it is not of that sort.

    Wrappings on the right are rotations, permutations and scalings without zeros; those on the left rotations
    and permutations, because a scaling there would put a G in the place of the identity.
    """
    weight = weight.double()
    if not isinstance(operator, Product):
        return Peeled(weight, operator, metric)
    first, last = _ends(operator)
    hessian, gradient = metric.hessian, metric.gradient
    for left in operator.terms[:first]:  # outermost first: E = L E'
        if not isinstance(left, _Orthogonal):
            return None
        back = left.inverse()
        weight, gradient = back.linear(weight.T).T, _congruence(back, gradient)
    for right in reversed(operator.terms[last:]):
        if isinstance(right, Diagonal) and not bool(right.vector.all()):
            return None
        weight, hessian = _inverse_transposed(right).linear(weight), _congruence(right, hessian)
    return Peeled(weight, core(operator), Metric(hessian, gradient))


def _ends(operator: Product) -> tuple[int, int]:
    """Terms from ``first`` to before ``last`` are the core; at least one is."""
    wrappers = [isinstance(term, _Orthogonal | Diagonal) for term in operator.terms]
    inner = [i for i, wraps in enumerate(wrappers) if not wraps] or [len(wrappers) - 1]
    return inner[0], inner[-1] + 1


def _inverse_transposed(operator: Expression) -> Expression:
    return Diagonal(1 / operator.vector.double()) if isinstance(operator, Diagonal) else operator


def _congruence(operator: Expression, side: Tensor | None) -> Tensor | None:
    """``B side Bᵀ``; the identity (``None``) stays one where B is orthogonal."""
    if side is None and not isinstance(operator, Diagonal):
        return None
    if side is None:
        side = torch.ones(operator.shape[0], dtype=torch.float64)
    if side.ndim == 1 and isinstance(operator, Diagonal):
        scaled: Tensor = side * operator.vector.to(side).square()
        return scaled
    dense = torch.diag(side) if side.ndim == 1 else side
    product = operator.linear(operator.linear(dense.double()).T)
    return (product + product.T) / 2
