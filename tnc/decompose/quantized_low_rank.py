"""A low-rank term whose factors are stored in number formats, at a rank, a bit budget or an error."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.column_space import Solver, spectrum
from tnc.decompose.factor_formats import FactorFormats
from tnc.decompose.factors import QuantizedFactors, quantize_factors
from tnc.decompose.low_rank import fit_low_rank
from tnc.decompose.sizes import BitsPerWeight, Rank, RelativeError, Size, fixed_rank, rank_within_bits
from tnc.errors import BudgetError
from tnc.metric import Metric
from tnc.terms import dense64


def fit_quantized_low_rank(
    residual: Tensor, weight: Tensor, size: Size, metric: Metric, formats: FactorFormats, *, method: str,
    solver: Solver | None, spent_bits: int,
) -> QuantizedFactors:  # fmt: skip
    """The optimal factors of ``residual``, quantized (`quantize_factors`); the rank comes from ``size``.

    Args:
        residual: (m, n) what the other terms leave over.
        weight: (m, n), sets the scale of relative errors.
        size: `RelativeError` is met as stored by the smallest rank of a bisection (errors of rounded factors
            fall with the rank, but not strictly); `BitsPerWeight` counts ``spent_bits`` too.
        metric: ``G ⊗ H``.
        formats: of the factors.
        method: quantizer of the factors.
        solver: as in `truncated_svd`.
        spent_bits: bits of the other terms.

    Raises:
        RankError: if the rank is outside 0..min(m, n).
        BudgetError: if no rank meets the error or the bits.
        FormatError: if a group size does not divide the row of its factor.
    """
    shape = (weight.shape[0], weight.shape[1])

    def at(rank: int) -> QuantizedFactors:
        found = fit_low_rank(
            residual, weight, Rank(rank), metric, solver=solver, dtype=torch.float64, spent_bits=spent_bits
        )
        if rank == 0:  # nothing to store, in any format
            return QuantizedFactors(found.term, None, ())
        return quantize_factors(residual, found.term, metric, formats, method=method)

    ranks = [k for k in range(min(shape) + 1) if formats.fits(k)]
    if isinstance(size, RelativeError):
        errors = _Errors(residual, metric, metric.norm(weight.double()), at)
        return _within_error(errors, size, _start(residual, metric, size.value * errors.scale, ranks))
    if isinstance(size, BitsPerWeight):
        return at(rank_within_bits(size, shape, spent_bits, lambda k: formats.stored_bits(shape, k), ranks))
    return at(fixed_rank(size, shape, "LowRankStage"))


@dataclass(frozen=True, eq=False)
class _Errors:
    """Relative errors, as stored, of a fit at a rank."""

    residual: Tensor
    metric: Metric
    scale: float
    at: Callable[[int], QuantizedFactors]

    def of(self, fit: QuantizedFactors) -> float:
        size = self.metric.norm(self.residual.double() - dense64(fit.term))
        return size / self.scale if self.scale > 0 else (0.0 if size == 0 else float("inf"))


def _start(residual: Tensor, metric: Metric, largest: float, ranks: Sequence[int]) -> Sequence[int]:
    """The ranks from the smallest at which unrounded factors would do, the last one at least."""
    energy = spectrum(residual, metric).square()
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    enough = int((tails > largest**2).sum())
    return ranks[min(bisect_left(ranks, enough), len(ranks) - 1) :]


def _within_error(errors: _Errors, size: RelativeError, ranks: Sequence[int]) -> QuantizedFactors:
    """Ranks are tried in growing steps until one does, then between it and the last that did not."""
    low, high, step = -1, 0, 1  # positions: low fails, high is tried
    best, least = None, float("inf")
    while best is None:
        fit = errors.at(ranks[high])
        error = errors.of(fit)
        least = min(least, error)
        if error <= size.value:
            best = fit
        elif high == len(ranks) - 1:
            raise BudgetError(
                f"RelativeError({size.value}) cannot be met with these factor formats; the smallest relative error "
                f"found is {least:.3e}. Ask for more, or use wider factor formats."
            )
        else:
            low, high, step = high, min(high + step, len(ranks) - 1), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        fit = errors.at(ranks[middle])
        if errors.of(fit) <= size.value:
            best, high = fit, middle
        else:
            low = middle
    return best
