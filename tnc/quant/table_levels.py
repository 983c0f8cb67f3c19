"""Levels of `TableFormat`: the numbers of a table, times the scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tnc.formats import NumberFormat, TableFormat
from tnc.quant.levels import Columns, Levels, divisor_of, register_levels


@dataclass(frozen=True)
class SortedTable:
    """A table's different levels in rising order.

    Attributes:
        levels: (k,).
        codes: (k,) uint8, the code of each; +0 rather than -0.
        limits: (k - 1,) between neighbours; a value at a limit belongs below.
    """

    levels: Tensor
    codes: Tensor
    limits: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Positions of the nearest levels, int32."""
        return torch.bucketize(values, self.limits, out_int32=True)


@dataclass(frozen=True)
class TableLevels:
    """``scale * table``; a chosen level is its position in the sorted table."""

    scale: Tensor
    table: SortedTable

    def nearest(self, values: Tensor) -> Tensor:
        """Nearest level; ties go to the even code, as IEEE 754 rounds small floats."""
        return self.table.nearest(values / divisor_of(self.scale))

    def values(self, chosen: Tensor) -> Tensor:
        """Scale times level."""
        return self.scale * self.table.levels[chosen]

    def codes(self, chosen: Tensor) -> Tensor:
        """The table's code."""
        return self.table.codes[chosen]

    def at(self, pick: Callable[[Tensor], Tensor]) -> TableLevels:
        """Some of the entries."""
        return TableLevels(pick(self.scale), self.table)

    def least_squared_errors(self, values: Tensor) -> Tensor:
        """The squared error of the nearest levels."""
        return (values - self.values(self.nearest(values))).square().sum(0)

    def columns(self) -> Columns:
        """Column by column."""
        scale = self.scale.T.contiguous()
        return _TableColumns(scale, divisor_of(scale), self.table)


@dataclass(frozen=True)
class _TableColumns:
    scale: Tensor
    divisor: Tensor
    table: SortedTable
    dtype: torch.dtype = torch.int32

    def round(self, j: int, target: Tensor, column: Tensor, error: Tensor) -> Tensor:
        chosen = self.table.nearest(target.div_(self.divisor[j]))
        torch.addcmul(column, self.table.levels[chosen], self.scale[j], value=-1, out=error)
        return chosen

    def codes(self, chosen: Tensor) -> Tensor:
        return self.table.codes[chosen]


@lru_cache(maxsize=64)
def sorted_table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> SortedTable:
    """The levels of a table in rising order, with limits half-way between neighbours.

    A value exactly half-way belongs to the neighbour of even code; the limits are moved by one unit of
    roundoff where that is the upper one.
    """
    codes: dict[float, int] = {}
    for code, value in enumerate(values):
        if math.isfinite(value):
            codes.setdefault(value, code)  # -0.0 == 0.0: the first stays
    levels = torch.tensor(sorted(codes), dtype=torch.float64)
    order = torch.tensor([codes[v] for v in sorted(codes)])
    limits = ((levels[1:] + levels[:-1]) / 2).to(dtype)
    below = torch.nextafter(limits, torch.full_like(limits, -torch.inf))
    limits = torch.where((order[:-1] % 2 == 1) & (order[1:] % 2 == 0), below, limits)
    return SortedTable(levels.to(device, dtype), order.to(device, torch.uint8), limits.to(device))


def _table(format: NumberFormat, scale: Tensor, zero: Tensor | None) -> Levels:
    assert isinstance(format, TableFormat)
    return TableLevels(scale, sorted_table(format.values, scale.dtype, scale.device))


register_levels(TableFormat, _table)
