"""A matrix product operator of a matrix that is only known by its products: randomized, streamed, never held.

The matrix is read a block of columns at a time. A sketch finds the column space of its middle unfolding (Halko,
Martinsson and Tropp 2011, arXiv:0909.4061), a second reading projects onto it, and the two thin factors that result
are swept like any tensor train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from tnc.errors import ShapeError, check_finite
from tnc.networks.modes import Modes, check_pair
from tnc.networks.truncate import split
from tnc.networks.tt_svd import MaxRank, MpoFit, check_eps, check_ranks
from tnc.terms import Mpo


class LinearMap(Protocol):
    """What is needed of a matrix: ``scipy.sparse.linalg.aslinearoperator(A)``, or anything with these two members."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def matmat(self, columns: Any, /) -> Any:  # noqa: ANN401
        """``A @ columns``: numpy float64 (in_features, k) to (out_features, k)."""


@dataclass(frozen=True)
class _Halves:
    """The modes before and after the middle bond."""

    outs: tuple[int, int]
    ins: tuple[int, int]


def tt_svd_of_operator(
    operator: LinearMap, out_modes: Sequence[int], in_modes: Sequence[int], *, max_rank: MaxRank,
    eps: float | None = None, dtype: torch.dtype = torch.float32, steps: int = 1, oversample: int = 16, seed: int = 0,
) -> MpoFit:  # fmt: skip
    """A matrix product operator of a linear map, and its exact error, without the matrix.

    Args:
        operator: the map; it is asked for the products with all unit vectors ``2 (steps + 1) + 1`` times.
        out_modes: d >= 2 output modes, product out_features: no padding.
        in_modes: d input modes.
        max_rank: one limit for all bonds, or d - 1 limits.
        eps: relative Frobenius error at which fewer directions are kept; that ``max_rank`` stopped it is a note.
        dtype: of the stored cores.
        steps: power steps; each lowers the error towards that of `tt_svd` and reads the map twice more.
        oversample: columns of the sketch beyond the rank.
        seed: of the Gaussian sketch.

    Returns:
        The operator and its error as stored, measured by a last reading.

    Raises:
        ShapeError: if the modes do not multiply to the shape, or there are fewer than two.
        NonFiniteError: if a product holds NaN or Inf.
        RankError, BudgetError: as in `tt_svd_with_report`.

    Memory: the sketch, ``(rank + oversample) (s_1 .. s_c + s_c+1 .. s_d)`` numbers for site sizes s and the most
    balanced bond c, and one block of columns.
    """
    shape = (int(operator.shape[0]), int(operator.shape[1]))
    outs, ins = check_pair(shape, out_modes, in_modes)
    if len(outs) < 2 or (prod(outs), prod(ins)) != shape:
        raise ShapeError(
            f"tt_svd_of_operator over modes {outs} x {ins} of a map of shape {shape}; expected two modes or more that "
            "multiply to the shape exactly."
        )
    limits = check_ranks(max_rank, outs, ins, "tt_svd_of_operator")
    share = None if eps is None else check_eps(eps, "tt_svd_of_operator") / (1 if len(limits) == 1 else 2)
    sites = [o * i for o, i in zip(outs, ins, strict=True)]
    middle = min(range(1, len(sites)), key=lambda c: prod(sites[:c]) + prod(sites[c:]))
    halves = _Halves((prod(outs[:middle]), prod(outs[middle:])), (prod(ins[:middle]), prod(ins[middle:])))
    width = min(limits[middle - 1] + oversample, prod(sites[:middle]), prod(sites[middle:]))
    basis, rest, energy = _middle(operator, halves, width, steps, seed)
    allowed = None if share is None else share**2 * energy
    outside = max(energy - float(rest.square().sum()), 0.0)
    inner = split(rest, limits[middle - 1], None if allowed is None else max(allowed - outside, 0.0))
    apart = None if allowed is None else allowed / max(len(limits) - 1, 1)
    weighted, right = _right_orthonormal(basis @ inner.basis, inner.rest)
    cores, left, tails = _left_half(weighted, outs[:middle], ins[:middle], limits[: middle - 1], apart)
    more, others = _right_half(left @ right, outs[middle:], ins[middle:], limits[middle:], apart)
    stored = Mpo(tuple(core.to(dtype).contiguous() for core in (*cores, *more)), shape)
    discarded = (*tails, outside + float(inner.tail), *others)
    error = _distance(operator, halves, stored) / energy**0.5 if energy > 0 else 0.0
    missed = eps is not None and error > eps
    return MpoFit(stored, error, discarded, (f"max_rank={max_rank} leaves more than eps allows",) if missed else ())


def _blocks(operator: LinearMap, halves: _Halves) -> Iterator[tuple[int, Tensor]]:
    """(i, (o_left, o_right i_right)) for every left input index i: the unfolding's rows (o_left, i), read in turn."""
    width = halves.ins[1]
    for i in range(halves.ins[0]):
        columns = numpy.zeros((operator.shape[1], width))
        columns[i * width : (i + 1) * width] = numpy.eye(width)
        block = torch.from_numpy(numpy.asarray(operator.matmat(columns), dtype=numpy.float64))
        yield i, check_finite(block, "product").reshape(halves.outs[0], -1)


def _middle(operator: LinearMap, halves: _Halves, width: int, steps: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Orthonormal basis (o_left i_left, width) of the middle unfolding, its projection, and the squared norm of all."""
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(halves.outs[1] * halves.ins[1], width, generator=generator, dtype=torch.float64)
    for _ in range(steps + 1):
        rows = torch.empty(halves.outs[0], halves.ins[0], width, dtype=torch.float64)
        for i, block in _blocks(operator, halves):
            rows[:, i] = block @ sketch
        basis = torch.linalg.qr(rows.reshape(-1, width)).Q
        by_index = basis.reshape(halves.outs[0], halves.ins[0], width)
        rest, energy = torch.zeros(width, len(sketch), dtype=torch.float64), 0.0
        for i, block in _blocks(operator, halves):
            rest += by_index[:, i].T @ block
            energy += float(block.square().sum())
        sketch = torch.linalg.qr(rest.T).Q
    return basis, rest, energy


def _distance(operator: LinearMap, halves: _Halves, mpo: Mpo) -> float:
    """Frobenius norm of the map minus the operator, a block of columns at a time."""
    width, total = halves.ins[1], 0.0
    for i, block in _blocks(operator, halves):
        units = torch.zeros(width, operator.shape[1], dtype=torch.float64)
        units[:, i * width : (i + 1) * width] = torch.eye(width, dtype=torch.float64)
        total += float((block - mpo.linear(units).T.reshape(block.shape)).square().sum())
    distance: float = total**0.5
    return distance


def _right_orthonormal(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(right.T)
    return left @ R.T, Q.T


def _left_half(
    factor: Tensor, outs: Modes, ins: Modes, limits: Modes, allowed: float | None
) -> tuple[list[Tensor], Tensor, list[float]]:
    """Left-orthonormal cores of (outputs inputs, r), the triangle left over, and the tails."""
    rank = factor.shape[1]
    rest = _by_sites(factor.reshape(*outs, *ins, rank), len(outs), lead=0).reshape(1, -1)
    cores, tails, before = [], [], 1
    for o, i, limit in zip(outs, ins, limits, strict=False):
        step = split(rest.reshape(before * o * i, -1), limit, allowed)
        cores.append(step.basis.reshape(before, o, i, -1))
        tails.append(float(step.tail))
        rest, before = step.rest, step.basis.shape[1]
    Q, R = torch.linalg.qr(rest.reshape(before * outs[-1] * ins[-1], rank))
    return [*cores, Q.reshape(before, outs[-1], ins[-1], -1)], R, tails


def _right_half(
    factor: Tensor, outs: Modes, ins: Modes, limits: Modes, allowed: float | None
) -> tuple[list[Tensor], list[float]]:
    """Cores of (r, outputs inputs) behind orthonormal ones, and the tails."""
    before = factor.shape[0]
    rest = _by_sites(factor.reshape(before, *outs, *ins), len(outs), lead=1)
    cores, tails = [], []
    for o, i, limit in zip(outs, ins, limits, strict=False):
        step = split(rest.reshape(before * o * i, -1), limit, allowed)
        cores.append(step.basis.reshape(before, o, i, -1))
        tails.append(float(step.tail))
        rest, before = step.rest, step.basis.shape[1]
    return [*cores, rest.reshape(before, outs[-1], ins[-1], 1)], tails


def _by_sites(legs: Tensor, d: int, *, lead: int) -> Tensor:
    """Output and input legs of d sites interleaved; ``lead`` axes before them, the rest behind."""
    order: list[int] = [lead + leg for k in range(d) for leg in (k, d + k)]
    return legs.permute([*range(lead), *order, *range(lead + 2 * d, legs.ndim)]).contiguous()
