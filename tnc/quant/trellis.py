"""Levels of `TrellisFormat`: the nearest sequence of every column instead of the nearest number of every entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import CODES, NumberFormat, TrellisFormat
from tnc.quant.levels import Columns, Levels, register_levels
from tnc.quant.viterbi import Trellis, encode, least_costs

_FLOATS = 1 << 25  # costs held at a time by the encoder (128 MB), or one ring's


@lru_cache(maxsize=8)
def trellis_of(format: TrellisFormat) -> Trellis:
    """The trellis of a format, kept."""
    return Trellis.of(CODES[format.code](torch.arange(1 << format.state_bits)), format.bits)


@dataclass(frozen=True)
class TrellisLevels:
    """Scales of (m, ...) entries; chosen levels are the codes themselves. The encoder runs on the CPU."""

    format: TrellisFormat
    scale: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Codes (m, ...) of the nearest sequences, weighted by the squares of the scales."""
        scale = self.scale.expand(values.shape).reshape(len(values), -1)
        targets, weights = _normalized(values.reshape(scale.shape), scale)
        found = []
        for length, rows in _runs(self.format, len(values)):
            rings, shares = _rings(targets[rows], length), _rings(weights[rows], length)
            step = max(1, _FLOATS // (length << self.format.state_bits))
            parts = zip(torch.split(rings, step, 1), torch.split(shares, step, 1), strict=True)
            codes = torch.cat([encode(trellis_of(self.format), *part) for part in parts], 1)
            found.append(codes.reshape(length, -1, scale.shape[1]).transpose(0, 1).reshape(-1, scale.shape[1]))
        return torch.cat(found).reshape(values.shape).to(values.device)

    def values(self, chosen: Tensor) -> Tensor:
        """Scale times the levels of whole columns."""
        return self.scale * self.format.decode(chosen, None, self.scale.dtype)

    def codes(self, chosen: Tensor) -> Tensor:
        """Chosen levels are codes."""
        return chosen

    def least_squared_errors(self, values: Tensor) -> Tensor:
        """(c,) float64, at most the squared error of any codes on the columns ``values`` (m, c)."""
        scale = self.scale.expand(values.shape)
        targets, weights = _normalized(values, scale)
        total = torch.zeros(values.shape[1], dtype=torch.float64)
        for length, rows in _runs(self.format, len(values)):
            rings, shares = _rings(targets[rows], length), _rings(weights[rows], length)
            step = max(1, _FLOATS // (length << self.format.state_bits))
            parts = zip(torch.split(rings, step, 1), torch.split(shares, step, 1), strict=True)
            least = torch.cat([least_costs(trellis_of(self.format), *part) for part in parts])
            total += least.reshape(-1, values.shape[1]).sum(0)
        return total * scale.double().amax().cpu() ** 2

    def columns(self) -> Columns:
        """Column by column."""
        return _TrellisColumns(self.format, self.scale.T.contiguous())

    def at(self, pick: Callable[[Tensor], Tensor]) -> Levels:
        """Refused: an entry of a sequence has no level without its neighbours."""
        raise FormatError(
            f"format {self.format.describe()} codes whole columns: entries are not rounded or refined one by one; use "
            "method='gptq' or 'rtn' and refine=0."
        )


@dataclass(frozen=True)
class _TrellisColumns:
    format: TrellisFormat
    scale: Tensor
    dtype: torch.dtype = torch.uint8

    def round(self, j: int, target: Tensor, column: Tensor, error: Tensor) -> Tensor:
        """Codes (m,) of the nearest sequences of column j."""
        levels = TrellisLevels(self.format, self.scale[j])
        chosen = levels.nearest(target)
        torch.sub(column, levels.values(chosen), out=error)
        return chosen

    def codes(self, chosen: Tensor) -> Tensor:
        """Chosen levels are codes."""
        return chosen


def _normalized(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Targets in units of the scale, and squared scales relative to the largest; float32 on the CPU."""
    targets = values / scale.masked_fill(scale == 0, torch.inf)
    weights = (scale / scale.amax().clamp_min(torch.finfo(scale.dtype).tiny)).square()
    return targets.to("cpu", torch.float32), weights.to("cpu", torch.float32)


def _runs(format: TrellisFormat, rows: int) -> list[tuple[int, slice]]:
    """Length of a sequence, and the rows of all neighbouring sequences of that length."""
    runs: list[tuple[int, slice]] = []
    for first, last in format.sequences(rows):
        if runs and runs[-1][0] == last - first:
            runs[-1] = last - first, slice(runs[-1][1].start, last)
        else:
            runs.append((last - first, slice(first, last)))
    return runs


def _rings(matrix: Tensor, length: int) -> Tensor:
    """Columns cut into sequences side by side: (s * length, c) to (length, s * c)."""
    return matrix.reshape(-1, length, matrix.shape[1]).transpose(0, 1).reshape(length, -1)


def _build(format: NumberFormat, scale: Tensor, zero: Tensor | None) -> Levels:
    assert isinstance(format, TrellisFormat)
    return TrellisLevels(format, scale)


register_levels(TrellisFormat, _build)
