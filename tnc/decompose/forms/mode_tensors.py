"""Tensor ring, Tucker and CP: a start over the mode tensor, then alternating least squares in the metric.

The starts minimise the Frobenius norm: Tucker and CP by TensorLy, the ring by TT-SVD. `tnc.decompose.refine` takes
them to ``G ⊗ H`` and never raises the error. Modes must multiply to the features exactly: no padding. TensorLy is
imported when it is used: that takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor

from tnc.decompose.forms.rank_choice import RankFamily, fit_size
from tnc.decompose.refine import refine
from tnc.decompose.sizes import Size
from tnc.errors import ShapeError, check_matrix
from tnc.metric import Metric
from tnc.networks import exact_modes, tt_svd
from tnc.networks.modes import Modes, check_pair, rank_bounds
from tnc.terms import Cp, Expression, TensorRing, Tucker, cast

_ITERATIONS = 10  # of TensorLy before the metric is looked at


def tensor_ring(
    weight: Tensor, rank: Size, *, ring: int = 2, cores: int = 3, modes: tuple[Modes, Modes] | None = None,
    metric: Metric | None = None, sweeps: int = 2, dtype: torch.dtype | None = None,
) -> TensorRing:  # fmt: skip
    """Tensor ring whose inner bonds are at most ``rank`` and whose closing bond is ``ring``.

    The start is the tensor train of those inner bonds with the closing bond unused, so that refinement in the
    metric never ends above it.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: of the inner bonds: an int or `Rank`, `RelativeError` or `BitsPerWeight`; 0 is the zero matrix.
        ring: dimension of the closing bond.
        cores: number of cores where no modes are given.
        modes: (out_modes, in_modes) that multiply to the shape; ``None`` takes the most balanced factorization.
        metric: ``None`` is the plain Frobenius norm.
        sweeps: of alternating least squares in the metric.
        dtype: of the stored cores; ``None`` is the dtype of ``weight``.

    Raises:
        ShapeError: if the modes do not multiply to the shape.
        RankError, BudgetError, NonFiniteError: as in `block_low_rank`.

    Cost: TT-SVD, then `refine`.
    Source: arXiv:1606.05535, equation 1; the start and the metric are ours.
    """
    check_matrix(weight, "weight")
    outs, ins = _modes(weight, cores, modes)
    sites = [o * i for o, i in zip(outs, ins, strict=True)]
    bounds = rank_bounds(outs, ins)

    def bits(rank: int) -> int:
        bonds = [ring, *(min(rank, bound) for bound in bounds), ring]
        pairs = zip(bonds, sites, bonds[1:], strict=False)
        return 0 if rank == 0 else sum(a * s * b for a, s, b in pairs) * (dtype or weight.dtype).itemsize * 8

    def start(rank: int) -> TensorRing:
        if rank == 0:
            pairs = zip(outs, ins, strict=True)
            return TensorRing(tuple(weight.new_zeros(0, o, i, 0, dtype=torch.float64) for o, i in pairs))
        train = tt_svd(weight.double(), outs, ins, max_rank=rank).cores
        return TensorRing(_closed(train, ring))

    family = _family("tensor_ring", weight, start, bits, max(bounds, default=1), metric, sweeps, dtype)
    found = fit_size(family, rank, weight, metric or Metric())
    assert isinstance(found, TensorRing)
    return found


def tucker(
    weight: Tensor, rank: Size, *, cores: int = 2, modes: tuple[Modes, Modes] | None = None,
    metric: Metric | None = None, sweeps: int = 2, dtype: torch.dtype | None = None,
) -> Tucker:  # fmt: skip
    """Tucker form of the mode tensor: orthogonal iteration by TensorLy, then refinement in the metric.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: of the largest mode; the other modes have ranks in proportion, rounded up. 0 is the zero matrix.
        cores: modes on each side where none are given.
        modes: as in `tensor_ring`.
        metric: ``None`` is the plain Frobenius norm.
        sweeps: of alternating least squares in the metric.
        dtype: of the stored tensors; ``None`` is the dtype of ``weight``.

    Raises:
        ShapeError, RankError, BudgetError, NonFiniteError: as in `tensor_ring`.

    Source: Tucker 1966; orthogonal iteration of De Lathauwer et al. 2000 as in TensorLy.
    """
    check_matrix(weight, "weight")
    outs, ins = _modes(weight, cores, modes)
    legs = (*outs, *ins)

    def bits(rank: int) -> int:
        return tucker_entries(legs, rank) * (dtype or weight.dtype).itemsize * 8

    def start(rank: int) -> Tucker:
        wanted = tucker_ranks(legs, rank)
        scaled, size = _scaled(weight, legs)
        if rank == 0 or size == 0:
            factors = tuple(weight.new_zeros(leg, r, dtype=torch.float64) for leg, r in zip(legs, wanted, strict=True))
            return Tucker(weight.new_zeros(wanted, dtype=torch.float64), factors)
        decompose: Any = import_module("tensorly.decomposition").tucker
        core, factors = decompose(scaled, rank=list(wanted), n_iter_max=_ITERATIONS)
        return Tucker(_beside(weight, core * size), tuple(_beside(weight, factor) for factor in factors))

    family = _family("tucker", weight, start, bits, max(legs), metric, sweeps, dtype)
    found = fit_size(family, rank, weight, metric or Metric())
    assert isinstance(found, Tucker)
    return found


def tucker_ranks(legs: Modes, rank: int) -> Modes:
    """Rank of every mode where the largest has ``rank``."""
    return tuple(min(-(-leg * rank // max(legs)), prod(legs) // leg) for leg in legs)


def tucker_entries(legs: Modes, rank: int) -> int:
    """Numbers of the core and all factors."""
    ranks = tucker_ranks(legs, rank)
    return prod(ranks) + sum(leg * r for leg, r in zip(legs, ranks, strict=True))


def cp(
    weight: Tensor, rank: Size, *, cores: int = 2, modes: tuple[Modes, Modes] | None = None,
    metric: Metric | None = None, sweeps: int = 2, seed: int = 0, dtype: torch.dtype | None = None,
) -> Cp:  # fmt: skip
    """CP form of the mode tensor: alternating least squares by TensorLy, then refinement in the metric.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: number of outer products: an int or `Rank`, `RelativeError` or `BitsPerWeight`; the largest is the
            product of all modes but the largest, where the form can be exact.
        cores: modes on each side where none are given.
        modes: as in `tensor_ring`.
        metric: ``None`` is the plain Frobenius norm.
        sweeps: of alternating least squares in the metric.
        seed: of the random start.
        dtype: of the stored factors; ``None`` is the dtype of ``weight``.

    Raises:
        ShapeError, RankError, BudgetError, NonFiniteError: as in `tensor_ring`.

    Source: Carroll and Chang 1970, Harshman 1970; TensorLy's ``parafac`` with a ridge of 1e-6 of the energy.
    """
    check_matrix(weight, "weight")
    outs, ins = _modes(weight, cores, modes)
    legs = (*outs, *ins)
    per_rank = sum(legs) * (dtype or weight.dtype).itemsize * 8

    def start(rank: int) -> Cp:
        scaled, size = _scaled(weight, legs)
        if rank == 0 or size == 0:
            return Cp(tuple(weight.new_zeros(leg, rank, dtype=torch.float64) for leg in legs))
        parafac: Any = import_module("tensorly.decomposition").parafac
        found = parafac(scaled, rank, n_iter_max=_ITERATIONS, init="random", random_state=seed, l2_reg=1e-6)
        factors = [_beside(weight, factor) for factor in found.factors]
        return Cp((factors[0] * size * _beside(weight, found.weights), *factors[1:]))

    limit = prod(legs) // max(legs)
    family = _family("cp", weight, start, lambda rank: rank * per_rank, limit, metric, sweeps, dtype)
    found = fit_size(family, rank, weight, metric or Metric())
    assert isinstance(found, Cp)
    return found


def _family(
    name: str, weight: Tensor, start: Callable[[int], Expression], bits: Callable[[int], int], limit: int,
    metric: Metric | None, sweeps: int, dtype: torch.dtype | None,
) -> RankFamily:  # fmt: skip
    def fit(rank: int) -> Expression:
        term = start(rank)
        if rank:
            term = refine(weight, term, metric or Metric(), sweeps=sweeps)
        return cast(term, dtype or weight.dtype)

    return RankFamily(name, fit, bits, limit)


def _modes(weight: Tensor, cores: int, modes: tuple[Sequence[int], Sequence[int]] | None) -> tuple[Modes, Modes]:
    shape = weight.shape[0], weight.shape[1]
    if modes is None:
        return exact_modes(shape[0], cores), exact_modes(shape[1], cores)[::-1]
    outs, ins = check_pair(shape, *modes)
    if (prod(outs), prod(ins)) != shape:
        raise ShapeError(
            f"modes {outs} x {ins} multiply to {(prod(outs), prod(ins))} for weight {shape}; expected the shape "
            "itself: only matrix product operators pad."
        )
    return outs, ins


def _scaled(weight: Tensor, legs: Modes) -> tuple[numpy.ndarray[Any, Any], float]:
    """The mode tensor with largest entry 1 in float64, and what it was divided by."""
    size = float(weight.double().abs().max())
    return (weight.double() / (size or 1.0)).reshape(legs).cpu().numpy(), size


def _beside(weight: Tensor, array: numpy.ndarray[Any, Any]) -> Tensor:
    """A copy of an array on the device of the weight."""
    return torch.from_numpy(array.copy()).to(weight.device)


def _closed(train: Sequence[Tensor], ring: int) -> tuple[Tensor, ...]:
    """A tensor train as a ring: further values of the closing bond enter at the first core and end in zeros."""
    if len(train) == 1:  # the trace of one core takes all of them
        first = train[0].new_zeros(ring, *train[0].shape[1:3], ring)
        first[0, :, :, 0] = train[0][0, :, :, 0]
        return (first,)
    first, last = train[0], train[-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ring - 1, *first.shape[1:], generator=generator, dtype=first.dtype).to(first.device)
    opened = torch.cat([first, noise * first.square().mean().sqrt()])
    ended = torch.cat([last, last.new_zeros(*last.shape[:3], ring - 1)], dim=3)
    return (opened, *train[1:-1], ended)
