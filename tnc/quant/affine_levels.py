"""Levels of `IntFormat`: whole numbers between a lowest and a highest, times the scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.formats import IntFormat, NumberFormat
from tnc.quant.levels import Columns, Levels, divisor_of, register_levels


@dataclass(frozen=True)
class AffineLevels:
    """``scale * level`` with whole levels from ``low`` to ``high``; a chosen level is that whole number."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Nearest level, ties to even."""
        return torch.round(values / divisor_of(self.scale)).clamp(self.low, self.high)

    def values(self, chosen: Tensor) -> Tensor:
        """Scale times level."""
        return self.scale * chosen

    def codes(self, chosen: Tensor) -> Tensor:
        """Level minus the lowest."""
        return (chosen - self.low).to(torch.uint8)

    def at(self, pick: Callable[[Tensor], Tensor]) -> AffineLevels:
        """Some of the entries."""
        return AffineLevels(pick(self.scale), pick(self.low), pick(self.high))

    def least_squared_errors(self, values: Tensor) -> Tensor:
        """The squared error of the nearest levels."""
        return (values - self.values(self.nearest(values))).square().sum(0)

    def columns(self) -> Columns:
        """Column by column."""
        scale, low, high = (t.T.contiguous() for t in (self.scale, self.low, self.high))
        return _AffineColumns(scale, divisor_of(scale), low, high, scale.dtype)


@dataclass(frozen=True)
class _AffineColumns:
    scale: Tensor
    divisor: Tensor
    low: Tensor
    high: Tensor
    dtype: torch.dtype

    def round(self, j: int, target: Tensor, column: Tensor, error: Tensor) -> Tensor:
        level = target.div_(self.divisor[j]).round_().clamp_(self.low[j], self.high[j])
        torch.addcmul(column, level, self.scale[j], value=-1, out=error)
        return level

    def codes(self, chosen: Tensor) -> Tensor:
        return (chosen - self.low).to(torch.uint8)


def _affine(format: NumberFormat, scale: Tensor, zero: Tensor | None) -> Levels:
    low = torch.full_like(scale, -(format.middle or 0)) if zero is None else -zero.to(scale.dtype)
    return AffineLevels(scale, low, low + (format.levels - 1))


register_levels(IntFormat, _affine)
