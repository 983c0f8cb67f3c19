"""Rounding and ranges learnt by gradient descent on ``tr(Eᵀ G E H)``: AutoRound, and OmniQuant's clipping alone.

The loss needs no activations: one step is one application of the metric, a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import Layout, NumberFormat
from tnc.metric import Metric
from tnc.quant.clip import CLIP_RATIOS
from tnc.quant.grid import Grid, check_quantizable
from tnc.quant.levels import Levels
from tnc.quant.registry import QuantizerEntry, QuantizerResult, needed, quantizer, register_quantizer
from tnc.quant.rescale import with_scales
from tnc.stats import LayerStats
from tnc.terms import Quantized, dense64

Progress = Callable[[int, int, float], None]
_CHECKS = 20  # times the codes as stored are measured and the best kept
_NARROWEST, _WIDEST = 0.4, 1.25  # learnt scales stay within these multiples of the fitted ones


def autoround(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    steps: int = 200,
    rate: float | None = None,
    start: str = "rtn",
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    progress: Progress | None = None,
) -> QuantizerResult:
    """Codes ``round(a/s + V)`` with V in [−½, ½] and the scales s learnt by signed gradient descent.

    The gradient goes straight through the rounding; steps fall linearly from ``rate`` to 0. ``a`` is the weight, or
    with ``start`` another quantizer's values: its codes then stand at V = 0, up to half a step. The best codes
    as stored, the start among them, are kept.

    Args:
        weight: (out_features, in_features), any float dtype; learnt in float32.
        stats: statistics of the layer: the loss is in ``G ⊗ H``, ``H`` without gradients.
        format: number format.
        steps: at least 0.
        rate: first step of V, in units of the scale, and of the scales, relative; ``None`` is ``1 / steps``.
        start: a name of `tnc.quant.QUANTIZERS`.
        clip_ratios: of the first grid.
        progress: called with (step, steps, squared error of the best so far).

    Raises:
        ShapeError, NonFiniteError, FormatError, StatsError: as `tnc.quant.gptq`; FormatError also for negative
            steps or a rate that is not positive.
        RecipeError: for an unknown start.

    Cost a step: one product ``G E H``, ``2 m n (m + n)`` flops. Deterministic: nothing is drawn.
    Source: SignRound (arXiv:2309.05516, equations 3 to 6), there on the outputs of a block and with activations.
    Integer zero points stay as fitted.
    """
    stats = needed(stats, "autoround")
    first = _start(weight, stats, format, start, clip_ratios)
    schedule = Schedule.of("autoround", steps, rate)
    term = _learn(weight, first.term, Metric.auto(stats), schedule, rounding=True, progress=progress)
    return replace(first, term=term)


def learned_clipping(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    steps: int = 100,
    rate: float = 0.01,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    progress: Progress | None = None,
) -> QuantizerResult:
    """Nearest codes on ranges learnt by signed gradient descent: OmniQuant's learnable weight clipping.

    Arguments and errors as `autoround`, without V. The paper learns both ends of a range through sigmoids on a
    block's outputs; here the scale is learnt, the zero point stays as fitted, and the loss is that of the layer.

    Source: OmniQuant (arXiv:2308.13137, section 3.2).
    """
    stats = needed(stats, "learned_clipping")
    first = _start(weight, stats, format, "rtn", clip_ratios)
    schedule = Schedule.of("learned_clipping", steps, rate)
    term = _learn(weight, first.term, Metric.auto(stats), schedule, rounding=False, progress=progress)
    return replace(first, term=term)


def _start(
    weight: Tensor, stats: LayerStats, format: NumberFormat, name: str, clip_ratios: Sequence[float]
) -> QuantizerResult:
    check_quantizable(weight, format, stats)
    return quantizer(name).run(weight, stats, format, clip_ratios=clip_ratios)


@dataclass(frozen=True)
class Schedule:
    """Number of steps and the rate of the first; later ones fall linearly to 0."""

    steps: int
    rate: float

    @classmethod
    def of(cls, name: str, steps: int, rate: float | None) -> Schedule:
        """Checked; a rate of ``None`` is ``1 / steps``."""
        rate = 1 / max(steps, 1) if rate is None else rate
        if steps < 0 or not rate > 0:
            raise FormatError(f"{name}(steps={steps}, rate={rate}) needs steps >= 0 and a rate above 0.")
        return cls(steps, rate)

    def at(self, step: int) -> float:
        """Rate of a step."""
        return self.rate * (1 - step / self.steps)


def _learn(
    weight: Tensor, first: Quantized, metric: Metric, schedule: Schedule, *, rounding: bool, progress: Progress | None
) -> Quantized:
    """The best term, as stored, on the way."""
    reference, narrow = weight.double(), weight.float()
    descent = Descent.of(narrow, first)
    best, least = first, metric.squared_norm(reference - dense64(first))
    every = max(1, schedule.steps // _CHECKS)
    for step in range(schedule.steps):
        descent.step(metric, schedule.at(step), rounding=rounding)
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            term = descent.stored()
            error = metric.squared_norm(reference - dense64(term))
            if error < least:
                best, least = term, error
            if progress is not None:
                progress(step + 1, schedule.steps, least)
    return best


@dataclass
class Descent:
    """Rounding and scales of one weight as they are learnt, by a layer's loss (`autoround`) or a block's.

    Attributes:
        weight: (m, n) what the values should stand for.
        anchor: (m, n) what is rounded where ``shift`` is 0.
        shift: V (m, n), in units of the scale.
        ratio: (block rows, groups) learnt scale over the fitted one.
        fitted: (block rows, groups) fitted scales.
        grid: the fitted grid.
        layout: which entries share a scale.
    """

    weight: Tensor
    anchor: Tensor
    shift: Tensor
    ratio: Tensor
    fitted: Tensor
    grid: Grid
    layout: Layout

    @classmethod
    def of(cls, weight: Tensor, first: Quantized) -> Descent:
        """From the codes of ``first``, which stand at V = 0, for a weight (m, n) float32."""
        grid = Grid.of(first)
        nearest = grid.dequantize(grid.quantize(weight))
        anchor = weight + (first.to_dense().float() - nearest)
        fitted = grid.scales(torch.float32)
        return cls(weight, anchor, torch.zeros_like(weight), torch.ones_like(fitted), fitted, grid, first.layout)

    def spread(self, blocks: Tensor) -> Tensor:
        """The value of every entry's block (m, n)."""
        return self.layout.spread(blocks)[:, : self.weight.shape[1]]

    def levels(self, grid: Grid) -> Levels:
        """Levels of all entries on a grid."""
        index = torch.arange(self.weight.shape[1], device=self.weight.device)
        return grid.levels(torch.float32, index, len(self.weight))

    def values(self) -> tuple[Tensor, Tensor]:
        """What the weight stands for now (m, n), and where the rounding has a slope: not beyond the range."""
        ratio = self.spread(self.ratio)
        place, target = self.levels(self.grid), self.anchor / ratio + self.shift * self.spread(self.fitted)
        chosen = place.values(place.nearest(target)) * ratio  # the fitted grid, stretched
        return chosen, (chosen - target * ratio).abs() <= self.spread(self.fitted) * ratio

    def learn(self, chosen: Tensor, inside: Tensor, pull: Tensor, rate: float, *, rounding: bool = True) -> None:
        """One signed step; ``pull`` (m, n) is against the gradient of the loss along the values, in any unit."""
        if rounding:
            self.shift.add_(torch.sign(pull) * inside, alpha=rate).clamp_(-0.5, 0.5)
        along = torch.where(inside, chosen - self.anchor, chosen)  # slope of the values in log(scale)
        self.ratio.mul_(1 + rate * torch.sign(self.layout.tiles(pull * along).sum(-1)))
        self.ratio.clamp_(_NARROWEST, _WIDEST)

    def step(self, metric: Metric, rate: float, *, rounding: bool) -> None:
        """One signed step against the gradient of the error in a metric."""
        chosen, inside = self.values()
        pull = metric.times_gradient(metric.times_hessian(self.weight - chosen))  # minus half the slope
        self.learn(chosen, inside, pull, rate, rounding=rounding)

    def stored(self) -> Quantized:
        """The term as it would be stored now."""
        grid = with_scales(self.grid, self.fitted * self.ratio, self.layout)
        place = self.levels(grid)
        target = self.anchor + self.shift * self.spread(grid.scales(torch.float32))
        return grid.term(place.codes(place.nearest(target)).to(torch.uint8))


register_quantizer(
    "autoround",
    QuantizerEntry("rounding and scales learnt by signed gradients", "arXiv:2309.05516", autoround),
)
register_quantizer(
    "learned_clipping",
    QuantizerEntry("nearest codes on ranges learnt by signed gradients (OmniQuant's LWC)", "arXiv:2308.13137",
                   learned_clipping),
)  # fmt: skip
