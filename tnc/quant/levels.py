"""Levels: the numbers that the entries of a weight can take, and the nearest of them.

One class a kind of format; `levels_of` finds it. *Chosen* levels are kept in whatever form is quickest and
become codes at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import NumberFormat


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


def divisor_of(scale: Tensor) -> Tensor:
    """The scale to divide by: infinity in the place of 0, so that what has no scale is 0."""
    return scale.masked_fill(scale == 0, torch.inf)
