"""`Grid`: the real numbers that the codes of a weight can stand for, one affine grid a group.

``value = scale * (code - zero)`` with ``code`` and ``zero`` integers in ``[0, 2**bits)``, so that 0 is always
on the grid. The integer ``code - zero`` is called the *level*. Levels are chosen with the scale as stored,
after its rounding to 16 bits; a group of scale 0 (all weights zero) stands for exact zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tnc.errors import FormatError, ShapeError, check_matrix
from tnc.formats import IntFormat
from tnc.stats import LayerStats
from tnc.terms import Quantized


class Levels(NamedTuple):
    """Broadcastable scale and range of the levels, in a working float dtype."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Nearest level of every value, ties to even; 0 where the scale is 0."""
        divisor = self.scale.masked_fill(self.scale == 0, torch.inf)
        return torch.round(values / divisor).clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Grid:
    """Affine grids of a weight (m, n).

    Attributes:
        scale: (m, groups) in the stored dtype, finite and at least 0.
        zero: (m, groups) uint8 in ``[0, 2**bits)``; ``2**(bits-1)`` everywhere when the format is symmetric.
        format: number format.
    """

    scale: Tensor
    zero: Tensor
    format: IntFormat

    @classmethod
    def of(cls, term: Quantized) -> Grid:
        """The grid a quantized term lies on."""
        return cls(term.scale, term.zeros().to(torch.uint8), term.format)

    def levels(self, dtype: torch.dtype, index: Tensor | None = None) -> Levels:
        """Scale and range of the levels in ``dtype``.

        Args:
            dtype: working dtype.
            index: (c,) column numbers in the weight, in any order, or ``None``.

        Returns:
            `Levels` of shape (m, c); without ``index`` (m, groups, 1), to broadcast over (m, groups, group).
        """
        if index is None:
            scale, zero = self.scale.unsqueeze(-1), self.zero.unsqueeze(-1)
        else:
            group = torch.zeros_like(index) if self.format.group_size is None else index // self.format.group_size
            scale, zero = self.scale[:, group], self.zero[:, group]
        low = -zero.to(dtype)
        return Levels(scale.to(dtype), low, low + (self.format.levels - 1))

    def quantize(self, columns: Tensor, index: Tensor | None = None) -> Tensor:
        """Nearest codes of the columns ``index`` of a weight, of all columns by default.

        Args:
            columns: (m, c) finite, any float dtype; computed in float32, in float64 for float64.
            index: (c,) column numbers in the weight.

        Returns:
            Codes (m, c) uint8.

        Raises:
            ShapeError: if there are other rows than the grid's, or other columns than ``index`` or whole
                groups.
        """
        wide = columns.to(working_dtype(columns))
        levels = self.levels(wide.dtype, index)
        nearest = levels.nearest(self._grouped(wide, index))
        return (nearest - levels.low).to(torch.uint8).reshape(columns.shape)

    def dequantize(self, codes: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values (m, c) in ``dtype`` of codes (m, c): the inverse map of `quantize`.

        Raises:
            ShapeError: as in `quantize`.
        """
        levels = self.levels(dtype, index)
        return (levels.scale * (self._grouped(codes.to(dtype), index) + levels.low)).reshape(codes.shape)

    def _grouped(self, columns: Tensor, index: Tensor | None) -> Tensor:
        """Columns in the shape that broadcasts against `levels`."""
        rows, groups = self.scale.shape
        count = columns.shape[-1]
        if index is not None:
            count = index.numel()
        elif self.format.group_size is not None:
            count = groups * self.format.group_size
        if tuple(columns.shape) != (rows, count):
            raise ShapeError(
                f"columns have shape {tuple(columns.shape)}; expected {(rows, count)} for a grid of {rows} "
                f"rows and {groups} groups. Pass the matching index, or all columns of the weight."
            )
        return columns.reshape(rows, groups, -1) if index is None else columns


def working_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_quantizable(weight: Tensor, format: IntFormat, stats: LayerStats | None) -> None:
    """Raise unless ``weight`` is a finite, non-empty matrix that fits the format and the statistics.

    Raises:
        ShapeError, NonFiniteError: for the weight.
        FormatError: if the group size does not divide in_features, or ``format`` is no `IntFormat`.
        StatsError: if the statistics are of another layer.
    """
    check_matrix(weight, "weight")
    if weight.numel() == 0:
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}, which holds no entries; expected at least one row "
            "and one column. Leave empty layers out."
        )
    if not isinstance(format, IntFormat):
        raise FormatError(f"format is {format!r}; expected a number format such as tnc.IntFormat(4, group_size=128).")
    format.group_of(weight.shape[1])
    if stats is not None:
        stats.check_weight(weight)
