"""Alternating least squares on any expression: every stored tensor in turn, by conjugate gradients in ``G ⊗ H``.

The matrix of an expression is linear in each of its stored float tensors (cores, factors, couplings; scales of a
quantized base are left alone). So with the others fixed the best value of one is a linear least-squares problem,
``min ||E - J δ||`` in the metric. Conjugate gradients lower its error at every step, however early they stop; a step
that rounding led astray, as where nothing is left to gain, is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.metric import Metric
from tnc.terms import Expression, Product, Quantized, Sum, cast, dense64, from_spec


def refine(weight: Tensor, term: Expression, metric: Metric, *, sweeps: int = 2, steps: int = 10) -> Expression:
    """``term`` with its factors improved in the metric.

    Args:
        weight: (out_features, in_features) that ``term`` stands for.
        term: any expression whose matrix is linear in each stored float tensor; its tensors are not changed.
        metric: the norm that is minimised.
        sweeps: rounds over the tensors.
        steps: of conjugate gradients for one tensor.

    Returns:
        An expression of the same structure, float64: the error before it is cast to a narrower dtype is never
        above that of ``term``.

    Cost: the matrix of the term of a sum that holds the tensor, its adjoint and ``2 m n (m + n)`` flops a step, in
    float64.
    """
    current = cast(term, torch.float64)
    left = _Left.of(weight, current, metric)
    for _ in range(sweeps):
        for name in trainable(term):
            moved = _improved(current, name, left, metric, steps)
            after = _Left.of(weight, moved, metric)
            if after.energy < left.energy:
                current, left = moved, after
    return current


@dataclass(frozen=True, eq=False)
class _Left:
    """Of the error E that an expression leaves: ``G E H`` (m, n) and ``tr(Eᵀ G E H)``."""

    seen: Tensor
    energy: float

    @classmethod
    def of(cls, weight: Tensor, term: Expression, metric: Metric) -> _Left:
        error = weight.double() - dense64(term)
        seen = _seen(metric, error)
        return cls(seen, float((error * seen).sum()))


def trainable(expression: Expression, prefix: str = "") -> tuple[str, ...]:
    """Names of the stored float tensors that are no part of a quantized base."""
    if isinstance(expression, (Sum, Product)):
        nested = (trainable(term, f"{prefix}{i}.") for i, term in enumerate(expression.terms))
        return tuple(name for names in nested for name in names)
    if isinstance(expression, Quantized):
        return ()
    return tuple(prefix + name for name, t in expression.tensors().items() if t.is_floating_point())


@dataclass(frozen=True, eq=False)
class _Linear:
    """``J``: a change of one tensor to the change of the matrix, and its adjoint by automatic differentiation."""

    term: Expression
    name: str
    zero: Tensor  # for the tensor; requires a gradient
    rest: Tensor  # the matrix there, with its graph: what terms of a sum inside a product add without the tensor

    @classmethod
    def of(cls, term: Expression, name: str) -> _Linear:
        while isinstance(term, Sum):  # the other terms of a sum do not move
            place, _, name = name.partition(".")
            term = term.terms[int(place)]
        with torch.enable_grad():
            zero = torch.zeros_like(term.tensors()[name], requires_grad=True)
            return cls(term, name, zero, _with(term, name, zero).to_dense())

    def __call__(self, change: Tensor) -> Tensor:
        """``J change``."""
        return _with(self.term, self.name, change).to_dense() - self.rest.detach()

    def adjoint(self, matrix: Tensor) -> Tensor:
        """``Jᵀ matrix``: the map is linear, so its graph at zero serves for every step."""
        (found,) = torch.autograd.grad(self.rest, self.zero, matrix, retain_graph=True)
        return found


def _with(term: Expression, name: str, value: Tensor) -> Expression:
    """The term with another value of one tensor."""
    return from_spec(term.spec(), {**term.tensors(), name: value})


def _improved(term: Expression, name: str, left: _Left, metric: Metric, steps: int) -> Expression:
    """The term after conjugate gradients on one tensor from where it is."""
    J = _Linear.of(term, name)
    total, seen = torch.zeros_like(term.tensors()[name]), left.seen
    slope = J.adjoint(seen)
    direction, size = slope, float(slope.square().sum())
    start = size
    for _ in range(steps):
        if size <= 1e-24 * start or size == 0:
            break
        change = J(direction)
        seen_change = _seen(metric, change)
        curvature = float((change * seen_change).sum())
        if curvature <= 0:
            break
        total, seen = total + size / curvature * direction, seen - size / curvature * seen_change
        slope = J.adjoint(seen)
        before, size = size, float(slope.square().sum())
        direction = slope + size / before * direction
    return _with(term, name, term.tensors()[name] + total)


def _seen(metric: Metric, matrix: Tensor) -> Tensor:
    return metric.times_gradient(metric.times_hessian(matrix))
