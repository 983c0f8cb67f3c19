"""Levels: the numbers that the entries of a weight can take, and the nearest of them.

One class a kind of format; `levels_of` finds it. *Chosen* levels are kept in whatever form is quickest and
become codes at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import IntFormat, NumberFormat, TableFormat


class Columns(Protocol):
    """Levels of one column of the weight after another, for quantizers with feedback."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of chosen levels."""

    def round(self, j: int, target: Tensor, column: Tensor, error: Tensor) -> Tensor:
        """Chosen levels (m,) nearest to ``target`` in column j; overwrites ``target``.

        Writes ``column`` minus the chosen values to ``error``.
        """

    def codes(self, chosen: Tensor) -> Tensor:
        """Codes (c, m) uint8 of the chosen levels of all columns."""


class Levels(Protocol):
    """Levels of (m, ...) entries, broadcastable over them."""

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest level of every value, as chosen; one of value 0 where the scale is 0."""

    def values(self, chosen: Tensor) -> Tensor:
        """The numbers that chosen levels stand for."""

    def codes(self, chosen: Tensor) -> Tensor:
        """Codes of chosen levels, uint8."""

    def least_squared_errors(self, values: Tensor) -> Tensor:
        """(c,) float64, at most the squared error of any codes on the columns ``values`` (m, c)."""

    def columns(self) -> Columns:
        """The same levels, where the entries are columns (m, c)."""

    def at(self, pick: Callable[[Tensor], Tensor]) -> Levels:
        """Levels of the entries that ``pick`` takes out of a tensor with one value an entry."""


@dataclass(frozen=True)
class AffineLevels:
    """``scale * level`` with whole levels from ``low`` to ``high``; a chosen level is that whole number."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Nearest level, ties to even."""
        return torch.round(values / _divisor(self.scale)).clamp(self.low, self.high)

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
        return _AffineColumns(scale, _divisor(scale), low, high, scale.dtype)


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
        return self.table.nearest(values / _divisor(self.scale))

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
        return _TableColumns(scale, _divisor(scale), self.table)


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


Build = Callable[[NumberFormat, Tensor, Tensor | None], Levels]
_BUILDERS: dict[type[NumberFormat], Build] = {}
B = TypeVar("B", bound=Build)


def register_levels(format: type[NumberFormat], build: Build) -> None:
    """Say how the levels of a kind of format are built: ``build(format, scale, zero)``; a kind can be taken once."""
    if format in _BUILDERS:
        raise FormatError(f"levels of {format.__qualname__} are already registered.")
    _BUILDERS[format] = build


def levels_of(format: NumberFormat, scale: Tensor, zero: Tensor | None) -> Levels:
    """Levels of ``format`` for real scales, and for zero points in the dtype of the scales where it has them.

    Raises:
        FormatError: for a kind of format that was not registered.
    """
    build = _BUILDERS.get(type(format))
    if build is None:
        known = ", ".join(each.__qualname__ for each in _BUILDERS)
        raise FormatError(f"format is {format!r}; quantizers know {known}. Register its levels with register_levels.")
    return build(format, scale, zero)


def _affine(format: NumberFormat, scale: Tensor, zero: Tensor | None) -> Levels:
    low = torch.full_like(scale, -(format.middle or 0)) if zero is None else -zero.to(scale.dtype)
    return AffineLevels(scale, low, low + (format.levels - 1))


def _table(format: NumberFormat, scale: Tensor, zero: Tensor | None) -> Levels:
    assert isinstance(format, TableFormat)
    return TableLevels(scale, sorted_table(format.values, scale.dtype, scale.device))


register_levels(IntFormat, _affine)
register_levels(TableFormat, _table)


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


def _divisor(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, torch.inf)
