"""Changes of basis before a decomposition: what is decomposed is ``W' = L⁻¹ W R⁻¹``, what stands for W is ``L Ŵ' R``.

A transform is exact, ``W = L W' R``, and takes the statistics along: the inputs become ``x' = R x``, so
``H' = R H Rᵀ``, the output gradients ``g' = Lᵀ g``, so ``G' = Lᵀ G L``. Then ``tr(E'ᵀ G' E' H') = tr(Eᵀ G E H)`` for
every error: norms and nats of the inner problem are those of the weight (MATH.md section 2). Without G the
identity takes its place, which only an orthogonal L keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.stats import LayerStats, Moments
from tnc.terms import Diagonal, Expression, Hadamard, LowRank, Permutation, Product

Wrap = Callable[[Expression], Expression]


@dataclass(frozen=True, eq=False)
class Transformed:
    """The inner problem of a transform and the way back.

    Attributes:
        weight: ``L⁻¹ W R⁻¹``, float64.
        stats: statistics of the inner problem, or ``None`` where there were none.
        wrap: an operator for the inner weight to the operator for the weight given.
        notes: everything that differs from what was asked, for the report.
        choices: what a search settled on, for the report.
    """

    weight: Tensor
    stats: LayerStats | None
    wrap: Wrap
    notes: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def storage_bits(self) -> int:
        """Bits that the wrapping alone stores."""
        rows, columns = self.weight.shape
        nothing = LowRank(self.weight.new_zeros(rows, 0), self.weight.new_zeros(0, columns))
        return self.wrap(nothing).storage_bits


class Transform(Protocol):
    """Anything that turns a layer's problem into an equivalent one."""

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The inner problem of ``weight`` (m, n) and its statistics."""


@dataclass(frozen=True)
class InputRotation:
    """Randomised Hadamard rotation of the inputs: ``W' = W Bᵀ``, ``H' = B H Bᵀ``, ``Ŵ = Ŵ' B``.

    It spreads outliers of the inputs and the weight over all columns. Layers of one width and seed share one
    rotation. Where no Hadamard matrix of order n is known the rotation is block-diagonal, and where the largest
    block is 1 nothing is rotated; the report says so.

    Attributes:
        seed: of the signs.

    Source: QuIP# (arXiv:2402.04396) section 3, one-sided.
    """

    seed: int = 0

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The rotated problem."""
        rotation = _rotation(weight.shape[1], self.seed, weight)
        return _unless_trivial(rotation, "input", weight, stats, lambda: change_inputs(weight, stats, rotation))


@dataclass(frozen=True)
class OutputRotation:
    """Randomised Hadamard rotation of the outputs: ``W' = A W``, ``G' = A G Aᵀ``, ``Ŵ = Aᵀ Ŵ'``.

    Attributes:
        seed: of the signs.

    Source: as `InputRotation`; with both the rotation is two-sided.
    """

    seed: int = 1

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The rotated problem."""
        rotation = _rotation(weight.shape[0], self.seed, weight)
        return _unless_trivial(rotation, "output", weight, stats, lambda: change_outputs(weight, stats, rotation))


def _rotation(features: int, seed: int, weight: Tensor) -> Hadamard:
    """On the device of the weight, the same on every one."""
    found = Hadamard.random(features, seed=seed)
    return replace(found, signs=found.signs.to(weight.device))


def _unless_trivial(
    rotation: Hadamard, side: str, weight: Tensor, stats: LayerStats | None, change: Callable[[], Transformed]
) -> Transformed:
    """The change of basis, with a note where the rotation is not over all features; none for blocks of 1."""
    size, block = rotation.features, rotation.block
    if block == 1:
        note = f"no {side} rotation: no Hadamard block above 1 divides {size} {side}s"
        return Transformed(weight.double(), stats, unwrapped, (note,) if size > 1 else ())
    changed = change()
    if block == size:
        return changed
    return replace(changed, notes=(f"{side} rotation in {size // block} blocks of {block}: no order {size} is known",))


def unwrapped(operator: Expression) -> Expression:
    """The wrapping of a transform that changes nothing."""
    return operator


def change_inputs(weight: Tensor, stats: LayerStats | None, orthogonal: Hadamard | Permutation) -> Transformed:
    """The problem in the inputs ``x' = B x``: ``W' = W Bᵀ`` and ``H' = B H Bᵀ``, B orthogonal.

    Raises:
        ShapeError: if B is not (n, n).
    """
    _check_size(orthogonal, weight.shape[1], "in_features")
    inner = orthogonal.linear(weight.double())

    def wrap(operator: Expression) -> Expression:
        return Product((operator, orthogonal))

    if stats is None:
        return Transformed(inner, None, wrap)
    heldout = None if stats.heldout is None else transform_moments(stats.heldout, orthogonal)
    moved = replace(stats, inputs=transform_moments(stats.inputs, orthogonal), heldout=heldout)
    return Transformed(inner, moved, wrap)


def change_outputs(weight: Tensor, stats: LayerStats | None, orthogonal: Hadamard | Permutation) -> Transformed:
    """The problem in the outputs ``y' = A y``: ``W' = A W`` and ``G' = A G Aᵀ``, A orthogonal.

    Raises:
        ShapeError: if A is not (m, m).
    """
    _check_size(orthogonal, weight.shape[0], "out_features")
    inner = orthogonal.linear(weight.double().T).T.contiguous()
    back = orthogonal.inverse()

    def wrap(operator: Expression) -> Expression:
        return Product((back, operator))

    if stats is None or stats.gradient is None:
        return Transformed(inner, stats, wrap)
    return Transformed(inner, replace(stats, gradient=transform_moments(stats.gradient, orthogonal)), wrap)


def transform_moments(moments: Moments, operator: Hadamard | Permutation | Diagonal) -> Moments:
    """Moments of ``B x`` from those of ``x``: ``B H Bᵀ``; mean ``|B x|`` where B mixes no entries, else ``None``."""
    half = operator.linear(moments.second.double()).T  # B H
    second = operator.linear(half)
    mean_abs = moments.mean_abs
    if mean_abs is not None:
        mean_abs = None if isinstance(operator, Hadamard) else operator.linear(mean_abs).abs()
    return Moments((second + second.T) / 2, mean_abs, moments.tokens)


@dataclass(frozen=True)
class InputPermutation:
    """Input columns in another order: ``W' = W Pᵀ``, ``Ŵ = Ŵ' P``.

    Attributes:
        indices: column ``indices[i]`` of the weight becomes column i.

    Raises:
        ShapeError: on use, if the indices are no permutation of the layer's inputs.
    """

    indices: tuple[int, ...]

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The permuted problem."""
        return change_inputs(weight, stats, Permutation.of(torch.tensor(self.indices, device=weight.device)))


@dataclass(frozen=True)
class OutputPermutation:
    """Output rows in another order: ``W' = P W``, ``Ŵ = Pᵀ Ŵ'``.

    Attributes:
        indices: row ``indices[i]`` of the weight becomes row i.

    Raises:
        ShapeError: on use, if the indices are no permutation of the layer's outputs.
    """

    indices: tuple[int, ...]

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The permuted problem."""
        return change_outputs(weight, stats, Permutation.of(torch.tensor(self.indices, device=weight.device)))


def apply_transforms(weight: Tensor, transforms: Sequence[Transform], stats: LayerStats | None) -> Transformed:
    """All transforms in turn, the first outermost: ``wrap`` puts the last one's wrapping on first."""
    current = Transformed(weight.double(), stats, unwrapped)
    for transform in transforms:
        inner = transform.apply(current.weight, current.stats)
        current = replace(
            inner, wrap=_composed(current.wrap, inner.wrap), notes=current.notes + inner.notes,
            choices=current.choices + inner.choices,
        )  # fmt: skip
    return current


def _composed(outer: Wrap, inner: Wrap) -> Wrap:
    return lambda operator: outer(inner(operator))


def _check_size(operator: Expression, features: int, name: str) -> None:
    if operator.shape != (features, features):
        raise ShapeError(
            f"a {operator.kind} of shape {operator.shape} was given for a weight with {name}={features}; "
            f"expected ({features}, {features})."
        )
