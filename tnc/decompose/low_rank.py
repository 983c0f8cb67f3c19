"""The two public low-rank decompositions: of a weight, and of what a base leaves over.

Both are the closed form of MATH.md section 1 (`tnc.column_space`); QERA-exact, EoRA, CLoQ, SVD-LLM and
plain SVD differ only in the matrix and the metric they are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.column_space import ColumnSpace, Exact, Solver, Subspace, choose_solver, column_space
from tnc.decompose.sizes import BitsPerWeight, RelativeError, Size, fixed_rank, float_bits, rank_within_bits
from tnc.errors import BudgetError, StatsError, check_matrix, check_same_shape
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Expression, LowRank, dense64
from tnc.terms.base import wide


def truncated_svd(
    weight: Tensor, rank: Size, *, metric: Metric | None = None, solver: Solver | None = None,
    dtype: torch.dtype | None = None,
) -> LowRank:  # fmt: skip
    """Best low-rank approximation of ``weight`` in the metric.

    Minimizes ``tr((W-LR)ᵀ G (W-LR) H)`` over products of the given rank. The attained error is
    ``sqrt(sum(sigma[rank:]**2))``, ``sigma = spectrum(weight, metric)``.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: an int or `Rank` in 0..min(weight.shape), `RelativeError` or `BitsPerWeight`.
        metric: ``None`` is the plain Frobenius norm.
        solver: `Exact` or `Subspace`; ``None`` chooses by size and rank.
        dtype: of the stored factors; ``None`` is the dtype of ``weight``.

    Returns:
        LowRank with left (out_features, rank) and right (rank, in_features), columns of ``left`` as long as
        the rows of ``right``. Where the spectrum ends before ``rank``, the rest is zero.

    Raises:
        RankError: if the rank is out of range.
        BudgetError: if no rank meets the error or bit budget.
        NonFiniteError: if ``weight`` holds NaN or Inf.

    Cost: see `column_space`.
    Source: Eckart and Young 1936; in H: SVD-LLM (arXiv:2403.07378); in G ⊗ H: MATH.md section 1.
    """
    check_matrix(weight, "weight")
    metric = metric or Metric()
    return _fit(weight, weight, rank, metric, solver, dtype or weight.dtype, spent_bits=0, caller="truncated_svd").term


def compensate(
    weight: Tensor, base: Expression, rank: Size, *, stats: LayerStats | None = None, metric: Metric | None = None,
    solver: Solver | None = None, dtype: torch.dtype | None = None,
) -> LowRank:  # fmt: skip
    """Best low-rank correction of ``base``: minimizes the error of ``base + left @ right``.

    The residual is taken of ``base`` as stored, so its rounding is corrected too. Never increases the error.

    Args:
        weight: (out_features, in_features), the dense weight.
        base: any expression of that shape, for example from `gptq`.
        rank: as in `truncated_svd`; `RelativeError` is relative to ``weight``, `BitsPerWeight` counts ``base`` too.
        stats: calibration statistics; the metric is ``G ⊗ H`` where gradients were calibrated, else ``H``.
        metric: used instead of ``stats`` where given.
        solver: as in `truncated_svd`.
        dtype: of the stored factors; ``None`` is the dtype of ``weight``.

    Returns:
        LowRank to be added to ``base``: ``Sum((base, term))``.

    Raises:
        ShapeError: if ``base`` and ``weight`` differ in shape.
        StatsError: if neither statistics nor a metric are given, or they are of another layer.
        RankError, BudgetError, NonFiniteError: as in `truncated_svd`.

    Source: QERA-exact (arXiv:2410.06040), EoRA (arXiv:2410.21271), CLoQ (arXiv:2501.18475), CALDERA
    (arXiv:2405.18886); here without inverse or damping (MATH.md section 1).
    """
    check_matrix(weight, "weight")
    check_same_shape(base.shape, (weight.shape[0], weight.shape[1]), "base", "weight")
    if metric is None:
        metric = _metric_of(weight, stats)
    return _fit(
        weight.double() - dense64(base), weight, rank, metric, solver, dtype or weight.dtype,
        spent_bits=base.storage_bits, caller="compensate",
    ).term  # fmt: skip


@dataclass(frozen=True, eq=False)
class LowRankFit:
    """A low-rank term and the energy ``sum(sigma[:rank]**2)`` it takes out of the residual, before storage rounding."""

    term: LowRank
    captured: float


def fit_low_rank(
    residual: Tensor, weight: Tensor, rank: Size, metric: Metric, *, solver: Solver | None, dtype: torch.dtype,
    spent_bits: int,
) -> LowRankFit:  # fmt: skip
    """Low-rank term for a residual that the engine already formed; ``weight`` sets the scale of relative errors."""
    return _fit(residual, weight, rank, metric, solver, dtype, spent_bits=spent_bits, caller="LowRankStage")


def _metric_of(weight: Tensor, stats: LayerStats | None) -> Metric:
    if stats is None:
        raise StatsError(
            "compensate needs calibration statistics or a metric; pass stats=..., or metric=Metric() for plain SVD."
        )
    stats.check_weight(weight)
    return Metric.auto(stats)


def _fit(
    residual: Tensor, weight: Tensor, size: Size, metric: Metric, solver: Solver | None, dtype: torch.dtype, *,
    spent_bits: int, caller: str,
) -> LowRankFit:  # fmt: skip
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(size, RelativeError):
        return _within_error(residual, size, metric, dtype, metric.norm(weight.double()))
    if isinstance(size, BitsPerWeight):
        rank = rank_within_bits(size, shape, spent_bits, lambda k: float_bits(shape, k, dtype))
    else:
        rank = fixed_rank(size, shape, caller)
    chosen = choose_solver(shape, rank) if solver is None else solver
    if isinstance(chosen, Subspace):  # products in the weight's precision, at least float32: half the time of float64
        residual = residual.to(wide(weight))
    space = column_space(residual, rank, metric, chosen)
    return LowRankFit(_stored(space, rank, dtype), float(space.captured.sum()))


def _within_error(
    residual: Tensor, size: RelativeError, metric: Metric, dtype: torch.dtype, scale: float
) -> LowRankFit:
    """Smallest rank whose error as stored is at most ``size.value * scale``; storage rounding may cost ranks."""
    whole = column_space(residual, min(residual.shape), metric, Exact())
    curve = _stored_errors(residual.double(), _stored(whole, whole.left.shape[1], dtype), metric)
    largest = size.value * scale
    # the curve's rounding is 1e-14 of its start: candidates within that are measured again
    for rank in (curve <= largest**2 + 1e-14 * curve[0]).nonzero().flatten().tolist():
        term = _stored(whole, rank, dtype)
        if metric.norm(residual.double() - dense64(term)) <= largest:
            return LowRankFit(term, float(whole.captured[:rank].sum()))
    reachable = max(float(curve.min()), 0.0) ** 0.5 / scale if scale > 0 else float("inf")
    raise BudgetError(
        f"RelativeError({size.value}) cannot be met with factors stored in {dtype}; the smallest reachable relative "
        f"error is {reachable:.3e}. Ask for more, or store the factors in a wider dtype."
    )


def _stored_errors(residual: Tensor, term: LowRank, metric: Metric) -> Tensor:
    """(rank + 1,) squared errors left by the first 0, 1, ... components of ``term`` as stored, float64.

    ``||D||² - 2 sum_i lᵢᵀ G D H rᵢ + sum_ij (lᵢᵀ G lⱼ)(rᵢᵀ H rⱼ)``, all ranks from one pass over ``D``.
    """
    left, right = term.left.double(), term.right.double()
    cross = ((metric.times_gradient(left).T @ residual) * metric.times_hessian(right)).sum(1)
    gram = (left.T @ metric.times_gradient(left)) * (metric.times_hessian(right) @ right.T)
    taken = gram.cumsum(0).cumsum(1).diagonal() - 2 * cross.cumsum(0)
    return metric.squared_norm(residual) + torch.cat([taken.new_zeros(1), taken])


def _stored(space: ColumnSpace, rank: int, dtype: torch.dtype) -> LowRank:
    """The first ``rank`` components, scaled so that both factors of each are equally long, padded with zeros."""
    left, right = space.left[:, :rank], space.right[:rank]
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), torch.ones_like(a))
    missing = rank - left.shape[1]
    left = torch.nn.functional.pad(left * scale, (0, missing))
    right = torch.nn.functional.pad(right / scale.unsqueeze(1), (0, 0, 0, missing))
    return LowRank(left.to(dtype), right.to(dtype))
