"""`Grid`: the real numbers that the codes of a weight can stand for.

Levels are chosen with the scales as stored, after their rounding; a block of scale 0 (all weights zero) stands
for exact zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnc.errors import FormatError, ShapeError, check_matrix
from tnc.formats import NumberFormat
from tnc.quant.levels import Levels, levels_of
from tnc.stats import LayerStats
from tnc.terms import Quantized


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points of a weight (m, n).

    Attributes:
        scale: (block rows, groups) as stored; (m, groups) in most formats.
        zero: (m, groups) uint8 for integer formats, mid-range everywhere when symmetric; ``None`` for others.
        format: number format.
        outer: second-level scales, or ``None``.
    """

    scale: Tensor
    zero: Tensor | None
    format: NumberFormat
    outer: Tensor | None = None

    @classmethod
    def of(cls, term: Quantized) -> Grid:
        """The grid a quantized term lies on."""
        zero = None if term.format.middle is None else term.zeros().to(torch.uint8)
        return cls(term.scale, zero, term.format, term.outer)

    def scales(self, dtype: torch.dtype) -> Tensor:
        """Real scales (block rows, groups), both levels multiplied."""
        kind, blocks = self.format.scales, (self.scale.shape[0], self.scale.shape[1])
        return kind.load(self.scale, None if self.outer is None else kind.spread(self.outer, blocks), dtype)

    def levels(self, dtype: torch.dtype, index: Tensor, rows: int) -> Levels:
        """Levels of the columns ``index`` (c,) of a weight with ``rows`` rows, for (m, c) entries in ``dtype``."""
        scale, zero = self.scales(dtype), self.zero
        spread = None if zero is None else self._spread(zero.to(dtype), index, rows)
        return levels_of(self.format, self._spread(scale, index, rows), spread)

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
        self._check(columns, index)
        wide = self._grouped(columns.to(working_dtype(columns)), index)
        levels = levels_of(self.format, *self._placed(wide.dtype, index, columns))
        return _flat(levels.codes(levels.nearest(wide)), columns)

    def dequantize(self, codes: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values (m, c) in ``dtype`` of codes (m, c): the inverse map of `quantize`.

        Raises:
            ShapeError: as in `quantize`.
        """
        self._check(codes, index)
        scale, zero = self._placed(dtype, index, codes)
        return _flat(scale * self.format.decode(self._grouped(codes, index), zero, dtype), codes)

    def least_squared_errors(self, columns: Tensor) -> Tensor:
        """(n,) float64, for every column of a weight (m, n) at most the squared error of any codes on this grid."""
        index = torch.arange(columns.shape[1], device=columns.device)
        self._check(columns, None)
        levels = self.levels(torch.float64, index, len(columns))
        return levels.least_squared_errors(columns.double())

    def term(self, codes: Tensor) -> Quantized:
        """The term with these codes (m, n)."""
        return Quantized.from_codes(codes, self.scale, self.zero, self.format, self.outer)

    def _placed(self, dtype: torch.dtype, index: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points in ``dtype``, broadcastable over what `_grouped` returns."""
        scale, zero = self.scales(dtype), None if self.zero is None else self.zero.to(dtype)
        if index is None and self.format.group_rows == 1:
            return scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
        if index is None:
            index = torch.arange(columns.shape[1], device=columns.device)
        rows = columns.shape[0]
        return self._spread(scale, index, rows), None if zero is None else self._spread(zero, index, rows)

    def _spread(self, values: Tensor, index: Tensor, rows: int) -> Tensor:
        """(block rows, groups) to (rows, c): the block of every entry of the columns ``index``."""
        group_size, group_rows = self.format.group_size, self.format.group_rows
        values = values[:, torch.zeros_like(index) if group_size is None else index // group_size]
        if group_rows == 1:
            return values
        return values.repeat_interleave(rows if group_rows is None else group_rows, 0)[:rows]

    def _grouped(self, columns: Tensor, index: Tensor | None) -> Tensor:
        """Columns in the shape that broadcasts against `_placed`."""
        if index is not None or self.format.group_rows != 1:
            return columns
        rows, groups = self.scale.shape
        return pad(columns, (0, self._padding(columns.shape[1]))).reshape(rows, groups, -1)

    def _padding(self, count: int) -> int:
        return -count % self.format.group_size if self.format.pad and self.format.group_size is not None else 0

    def _check(self, columns: Tensor, index: Tensor | None) -> None:
        if index is not None and not self.format.columns_alone:
            raise ShapeError(
                f"columns of {self.format.describe()} are not coded alone; pass all of them, without index."
            )
        (down, groups), (rows, count) = self.scale.shape, columns.shape
        group_size, group_rows = self.format.group_size, self.format.group_rows
        expected = count if index is None else index.numel()
        if index is None and group_size is not None and -(-count // group_size) != groups:
            expected = groups * group_size
        if index is None and group_size is not None and group_rows == 1 and not self.format.pad:
            expected = groups * group_size
        if down != (1 if group_rows is None else -(-rows // group_rows)) or count != expected:
            wanted = (down if group_rows == 1 else rows, expected)
            raise ShapeError(
                f"columns have shape {tuple(columns.shape)}; expected {wanted} for a grid of {down} "
                f"rows and {groups} groups. Pass the matching index, or all columns of the weight."
            )


def _flat(entries: Tensor, columns: Tensor) -> Tensor:
    """Entries of `Grid._grouped` in the shape of ``columns`` again, without padding."""
    return entries.reshape(len(columns), -1)[:, : columns.shape[1]]


def working_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_quantizable(weight: Tensor, format: NumberFormat, stats: LayerStats | None) -> None:
    """Raise unless ``weight`` is a finite, non-empty matrix that fits the format and the statistics.

    Raises:
        ShapeError, NonFiniteError: for the weight.
        FormatError: if the group size does not divide in_features, or ``format`` is no `NumberFormat`.
        StatsError: if the statistics are of another layer.
    """
    check_matrix(weight, "weight")
    if weight.numel() == 0:
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}, which holds no entries; expected at least one row "
            "and one column. Leave empty layers out."
        )
    if not isinstance(format, NumberFormat):
        raise FormatError(
            f"format is {format!r}; expected a number format such as tnc.IntFormat(4, group_size=128) or "
            'tnc.number_format("nf4", group_size=64).'
        )
    format.group_of(weight.shape[1])
    if stats is not None:
        stats.check_weight(weight)
