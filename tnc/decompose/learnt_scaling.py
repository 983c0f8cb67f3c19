"""`LearntScaling`: a scaling of the inputs learnt together with the ranges of the groups, OmniQuant's LET and LWC."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.decompose.scaling import awq_scale, balanced, scale_inputs
from tnc.decompose.transforms import Transformed, unwrapped
from tnc.errors import FormatError, RecipeError, StatsError
from tnc.formats import NumberFormat
from tnc.metric import Metric
from tnc.quant import rtn
from tnc.quant.levels import levels_of
from tnc.stats import LayerStats
from tnc.terms import dense64

_ALPHAS = (0.0, 0.25, 0.5, 0.75)  # starts, AWQ's scales; 0 is none
_CHECKS = 5  # times the rounded layer is measured as stored, with clip search


@dataclass(frozen=True)
class LearntScaling:
    """``s`` by gradient descent on ``tr(Eᵀ G E H)``, ``E = W - Q(W diag(s)) diag(1 / s)``, groups' ranges with it.

    Gradients go straight through the rounding to the ranges: a group's step follows the largest entries of
    ``W diag(s)``. Of the start and all scales on the way the one with the least error of `rtn` with clip search is
    kept; the stages then make codes of their own on it. It starts from the best of four of AWQ's scales, so no scaling
    at all is among the choices, and then none is stored.

    Attributes:
        format: number format that is rounded to; groups within rows.
        steps: of Adam; 0 keeps the start.
        rate: of the logarithms of s and of the ranges.

    Raises:
        RecipeError: for negative steps or a rate that is not positive.
        FormatError: for a format with blocks of several rows.
        StatsError: on use without statistics.

    Cost a step: two products ``G E H``.
    Source: OmniQuant (arXiv:2308.13137, sections 3.2 and 3.3). There a block's loss on activations, a shift beside
    the scaling, AdamW over 20 epochs; here the layer's loss without activations, and the scaling is stored.
    """

    format: NumberFormat
    steps: int = 50
    rate: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.rate > 0:
            raise RecipeError(f"LearntScaling(steps={self.steps}, rate={self.rate}) needs 0 or more and above 0.")
        if self.format.group_rows != 1 or not self.format.columns_alone:
            raise FormatError(
                f"LearntScaling rounds to groups within rows; got {self.format.describe()}. Use for example int4 g64."
            )

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The scaled problem."""
        if stats is None:
            raise StatsError("LearntScaling needs calibration statistics to learn by; pass stats=..., or leave it out.")
        errors = {alpha: self._error(weight, stats, awq_scale(stats, alpha)) for alpha in _ALPHAS}
        alpha = min(errors, key=lambda each: errors[each])
        best, least = awq_scale(stats, alpha), errors[alpha]
        descent = _Descent(weight.float(), best, self.format, Metric.auto(stats).to(torch.float32, weight.device))
        optimizer = torch.optim.Adam([descent.log_scale, descent.log_ratio], lr=self.rate)
        every, learnt = max(1, self.steps // _CHECKS), False
        for step in range(self.steps):
            descent.backward()
            optimizer.step()
            if (step + 1) % every == 0 or step + 1 == self.steps:
                scale = balanced(descent.log_scale.detach().double().exp())
                error = self._error(weight, stats, scale)
                if error < least:
                    best, least, learnt = scale, error, True
        if alpha == 0 and not learnt:
            return Transformed(weight.double(), stats, unwrapped, choices=("no scaling of the inputs",))
        gain = 1 - least / errors[0.0] if errors[0.0] > 0 else 0.0
        choice = f"scaling {'learnt' if learnt else 'of AWQ'} from alpha = {alpha:g}: squared error of rtn {-gain:+.1%}"
        return replace(scale_inputs(weight, stats, scale=best), choices=(choice,))

    def _error(self, weight: Tensor, stats: LayerStats, scale: Tensor) -> float:
        """Squared error in ``G ⊗ H`` of nearest codes with clip search, the scaling as stored."""
        inner = scale_inputs(weight, stats, scale)
        term = inner.wrap(rtn(inner.weight.float(), self.format, stats=inner.stats))
        return Metric.auto(stats).squared_norm((weight.double() - dense64(term)).float())


class _Descent:
    """Logarithms of s (n,) and of the groups' ranges (m, groups) over the full ones."""

    def __init__(self, weight: Tensor, scale: Tensor, format: NumberFormat, metric: Metric) -> None:
        self._weight, self._format, self._metric = weight, format, metric
        self._layout = format.layout((weight.shape[0], weight.shape[1]))
        self.log_scale = scale.float().log().to(weight.device).requires_grad_()
        self.log_ratio = torch.full(self._layout.blocks, -0.05, device=weight.device).requires_grad_()
        self._unit = max(metric.squared_norm(weight), 1e-30)

    def backward(self) -> None:
        """Gradients of the relative squared error."""
        with torch.enable_grad():
            scale = self.log_scale.exp()
            error = self._weight - self._rounded(self._weight * scale) / scale
            pull = self._metric.times_gradient(self._metric.times_hessian(error.detach()))
            self.log_scale.grad = self.log_ratio.grad = None
            ((2 / self._unit) * pull * error).sum().backward()  # type: ignore[no-untyped-call]

    def _rounded(self, matrix: Tensor) -> Tensor:
        """Nearest values, with slopes along the entries inside the range and along the steps."""
        tiles = self._layout.tiles(matrix)
        low, high = tiles.amin(-1).clamp_max(0), tiles.amax(-1).clamp_min(0)
        ratio = self.log_ratio.exp()
        step = (self._format.full_scale(tiles, low, high) * ratio).unsqueeze(-1)
        positive = step.masked_fill(step == 0, 1.0)
        zero = None
        if self._format.has_zero:
            zero = torch.round(-(low * ratio).unsqueeze(-1) / positive).clamp(0, self._format.levels - 1).detach()
        place = levels_of(self._format, positive.detach(), zero)
        levels = place.values(place.nearest(tiles.detach())) / positive.detach()
        wanted = tiles / positive
        inside = (wanted.detach() - levels).abs() <= 0.5
        rounded = positive * torch.where(inside, wanted + (levels - wanted).detach(), levels)
        return rounded.reshape(matrix.shape[0], -1)[:, : matrix.shape[1]]
