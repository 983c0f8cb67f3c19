"""How far an operator is from a layer: nats and relative errors, on calibration and on held-out tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnc.decompose.transforms import Transform, apply_transforms
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import LowRank


class Ruler:
    """Measures residuals of one layer, in one basis: nats and relative errors on both sets of tokens."""

    def __init__(self, source: Tensor, transforms: Sequence[Transform], stats: LayerStats) -> None:
        inner = apply_transforms(source, transforms, stats)
        assert inner.stats is not None, "curves are measured with statistics"
        stats = inner.stats
        self.stats, self.wrap, self.weight = stats, inner.wrap, inner.weight
        self.source = inner.weight.to(source.dtype)
        self.metric = Metric.auto(stats)
        self._gradient = None if stats.gradient is None else stats.gradient.second.double()
        inputs = [stats.inputs] if stats.heldout is None else [stats.inputs, stats.heldout]
        self._hessians = [each.second.double() for each in inputs]
        self._scales = [Metric(h).norm(self.weight) for h in self._hessians]

    def remainder(self, residual: Tensor) -> Remainder:
        """A residual (m, n) float64 as what terms are taken off."""
        return Remainder(residual, self._hessians, self._gradient, self._scales)


class Remainder:
    """What a base leaves over, with its products with the moments: errors of any low-rank term taken off it.

    ``‖D − Σ lᵢ rᵢ‖² = ‖D‖² − 2 Σᵢ lᵢᵀ G D H rᵢ + Σᵢⱼ (lᵢᵀ G lⱼ)(rᵢᵀ H rⱼ)``, so that a term costs no product of the
    size of the layer but two of its rank. Errors are nats, held-out nats, relative error, held-out relative error.
    """

    def __init__(
        self, residual: Tensor, hessians: Sequence[Tensor], gradient: Tensor | None, scales: Sequence[float]
    ) -> None:
        self.residual, self._hessians, self._gradient, self._scales = residual, hessians, gradient, scales
        self._seen = [residual @ hessian for hessian in hessians]  # D H (m, n)
        prices = [residual] if gradient is None else [residual, gradient @ residual]
        self._squares = [[float((seen * price).sum()) for seen in self._seen] for price in prices]

    @property
    def errors(self) -> tuple[float, float, float, float]:
        """With nothing taken off."""
        nothing = self.residual.new_zeros
        return self.errors_without(LowRank(nothing(self.residual.shape[0], 0), nothing(0, self.residual.shape[1])))

    def errors_without(self, term: LowRank) -> tuple[float, float, float, float]:
        """With all of a term taken off."""
        nats, heldout_nats, error, heldout_error = (float(e[-1]) for e in self.prefix_errors(term))
        return nats, heldout_nats, error, heldout_error

    def prefix_errors(self, term: LowRank) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each (rank + 1,): with the first 0, 1, … components of a term taken off."""
        left, right = term.left.double(), term.right.double()
        plain, *priced = [self._squared(left, right, side) for side in range(len(self._squares))]
        errors = [_relative(e, scale) for e, scale in zip(plain, self._scales, strict=True)]
        nats = [0.5 * e for each in priced for e in each] or [torch.full_like(errors[0], torch.nan)]
        return nats[0], nats[-1], errors[0], errors[-1]

    def _squared(self, left: Tensor, right: Tensor, side: int) -> list[Tensor]:
        """For each H: (rank + 1,) squared errors, by plain left factors (side 0) or in G (side 1)."""
        weighted = left if side == 0 or self._gradient is None else self._gradient @ left
        square, found = left.T @ weighted, []
        for hessian, seen, start in zip(self._hessians, self._seen, self._squares[side], strict=True):
            taken = (square * ((right @ hessian) @ right.T)).cumsum(0).cumsum(1).diagonal()
            taken = taken - 2 * ((weighted.T @ seen) * right).sum(1).cumsum(0)
            found.append((start + torch.cat([taken.new_zeros(1), taken])).clamp_min(0))
        return found


def _relative(squared: Tensor, scale: float) -> Tensor:
    """Relative, not squared; 0 where both vanish."""
    if scale > 0:
        return squared.sqrt() / scale
    return torch.where(squared > 0, torch.inf, 0.0)
