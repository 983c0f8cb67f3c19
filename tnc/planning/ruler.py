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

    def errors(self, residual: Tensor) -> tuple[float, float, float, float]:
        """nats, held-out nats, error, held-out error of a residual (m, n) float64."""
        nothing = LowRank(residual.new_zeros(residual.shape[0], 0), residual.new_zeros(0, residual.shape[1]))
        nats, heldout_nats, error, heldout_error = (float(e[0]) for e in self.prefix_errors(residual, nothing))
        return nats, heldout_nats, error, heldout_error

    def prefix_errors(self, residual: Tensor, term: LowRank) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, each (rank + 1,), with the first 0, 1, … components of a term taken off.

        ``‖D − Σ lᵢ rᵢ‖² = ‖D‖² − 2 Σᵢ lᵢᵀ G D H rᵢ + Σᵢⱼ (lᵢᵀ G lⱼ)(rᵢᵀ H rⱼ)``: sums over leading squares.
        """
        left, right = term.left.double(), term.right.double()
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        products = [(residual @ hessian, right @ hessian) for hessian in self._hessians]  # D H (m, n), R H (k, n)
        for priced, gradient in self._sides():
            weighted = left if gradient is None else gradient @ left
            price = residual if gradient is None else gradient @ residual
            seen_by_left, square = weighted.T @ residual, left.T @ weighted
            for seen, rows in products:
                taken = (square * (rows @ right.T)).cumsum(0).cumsum(1).diagonal()
                taken = taken - 2 * (seen_by_left * rows).sum(1).cumsum(0)
                found[priced].append(((seen * price).sum() + torch.cat([taken.new_zeros(1), taken])).clamp_min(0))
        errors = [_relative(e, scale) for e, scale in zip(found[False], self._scales, strict=True)]
        nats = [0.5 * e for e in found[True]] or [torch.full_like(errors[0], torch.nan)]
        return nats[0], nats[-1], errors[0], errors[-1]

    def _sides(self) -> list[tuple[bool, Tensor | None]]:
        """(whether the unit is nats, G)."""
        return [(False, None)] if self._gradient is None else [(True, self._gradient), (False, None)]


def _relative(squared: Tensor, scale: float) -> Tensor:
    """Relative, not squared; 0 where both vanish."""
    if scale > 0:
        return squared.sqrt() / scale
    return torch.where(squared > 0, torch.inf, 0.0)
