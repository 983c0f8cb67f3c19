"""What is learnt of one weight, rounding and scales, and a signed step on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import Layout
from tnc.metric import Metric
from tnc.quant.grid import Grid
from tnc.quant.levels import Levels
from tnc.quant.rescale import with_scales
from tnc.terms import Quantized

_NARROWEST, _WIDEST = 0.4, 1.25  # learnt scales stay within these multiples of the fitted ones


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
