"""Levels of `TrellisFormat`: the nearest sequence of every column instead of the nearest number of every entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import CODES, NumberFormat, TrellisFormat
from tnc.quant import viterbi, viterbi_compiled
from tnc.quant.levels import Columns, Levels, register_levels
from tnc.quant.viterbi import Trellis

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
        codes = torch.empty(targets.shape, dtype=torch.uint8)
        for rings in _rings(self.format, (targets.shape[0], targets.shape[1])):
            codes.view(-1)[rings] = encode_rings(self.format, targets.view(-1)[rings], weights.view(-1)[rings])
        return codes.reshape(values.shape).to(values.device)

    def values(self, chosen: Tensor) -> Tensor:
        """Scale times the levels of whole columns."""
        return self.scale * self.format.decode(chosen, None, self.scale.dtype)

    def codes(self, chosen: Tensor) -> Tensor:
        """Chosen levels are codes."""
        return chosen

    def least_squared_errors(self, values: Tensor) -> Tensor:
        """(c,) float64, at most the squared error of any codes on the columns ``values`` (m, c).

        Where lines are anti-diagonals that of the nearest levels of any states: sequences run through many columns.
        """
        if not self.format.columns_alone:
            return self._least_of_entries(values)
        total = torch.zeros(values.shape[1], dtype=torch.float64)
        scale = self.scale.expand(values.shape)
        targets, weights = _normalized(values, scale)
        for rings in _rings(self.format, (values.shape[0], values.shape[1])):
            least = least_ring_costs(self.format, targets.view(-1)[rings], weights.view(-1)[rings])
            total += least.reshape(-1, values.shape[1]).sum(0)
        return total * scale.double().amax().cpu() ** 2

    def _least_of_entries(self, values: Tensor) -> Tensor:
        scale = self.scale.expand(values.shape).double()
        levels = trellis_of(self.format).values[0].to(scale).sort().values
        targets = values.double() / scale.masked_fill(scale == 0, torch.inf)
        above = torch.bucketize(targets, levels).clamp_max(len(levels) - 1)
        distance = torch.minimum((targets - levels[above]).abs(), (targets - levels[(above - 1).clamp_min(0)]).abs())
        return torch.where(scale == 0, values.double(), scale * distance).square().sum(0)

    def columns(self) -> Columns:
        """Column by column; refused where lines are anti-diagonals."""
        if not self.format.columns_alone:
            raise FormatError(f"format {self.format.describe()} codes anti-diagonals: columns are not rounded in turn.")
        return _TrellisColumns(self.format, self.scale.T.contiguous())

    def at(self, pick: Callable[[Tensor], Tensor]) -> Levels:
        """Refused: an entry of a sequence has no level without its neighbours."""
        raise FormatError(
            f"format {self.format.describe()} codes whole {self.format.path}s: entries are not rounded one by one; use "
            "method='gptq' or 'rtn', or a format of anti-diagonals such as trellis2_diagonal with 'yaqa' and refine."
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


def encode_rings(format: TrellisFormat, targets: Tensor, weights: Tensor) -> Tensor:
    """Codes (T, B) uint8 of B rings of T entries each, in C where it can be, else as many at a time as memory holds.

    Args:
        format: of the codes.
        targets: (T, B) in units of the scale, float32 on the CPU.
        weights: (T, B) of the squared errors, in any unit.
    """
    trellis = trellis_of(format)
    if _in_c(trellis, len(targets)):
        return viterbi_compiled.encode(trellis, targets, weights)
    return torch.cat([viterbi.encode(trellis, *part) for part in _parts(format, targets, weights)], 1)


def least_ring_costs(format: TrellisFormat, targets: Tensor, weights: Tensor) -> Tensor:
    """(B,) float64, at most the weighted squared error of any codes of B rings (T, B), as `encode_rings` takes them."""
    trellis = trellis_of(format)
    if _in_c(trellis, len(targets)):
        return viterbi_compiled.least_costs(trellis, targets, weights)
    return torch.cat([viterbi.least_costs(trellis, *part) for part in _parts(format, targets, weights)])


def encoder_notes(format: NumberFormat) -> tuple[str, ...]:
    """For reports: that the encoder could not be compiled, and so is slow; the codes are the same."""
    reason = viterbi_compiled.refusal(trellis_of(format)) if isinstance(format, TrellisFormat) else None
    return () if reason is None else (f"the trellis encoder ran in torch, not in C, with the same codes: {reason}",)


def _in_c(trellis: Trellis, length: int) -> bool:
    return length > trellis.digits and viterbi_compiled.refusal(trellis) is None


def _parts(format: TrellisFormat, targets: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _FLOATS // (len(targets) << format.state_bits))
    return zip(torch.split(targets, step, 1), torch.split(weights, step, 1), strict=True)


def _normalized(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Targets in units of the scale, and squared scales relative to the largest; float32 on the CPU."""
    targets = values / scale.masked_fill(scale == 0, torch.inf)
    weights = (scale / scale.amax().clamp_min(torch.finfo(scale.dtype).tiny)).square()
    return targets.to("cpu", torch.float32).contiguous(), weights.to("cpu", torch.float32).contiguous()


def _rings(format: TrellisFormat, shape: tuple[int, int]) -> Iterator[Tensor]:
    """Flat numbers of the entries of all rings of one length (length, rings), length by length."""
    rows, columns = shape
    found: dict[int, list[Tensor]] = {}
    if format.path == "column":
        for first, last in format.sequences(rows):
            ring = torch.arange(first, last).unsqueeze(1) * columns + torch.arange(columns)
            found.setdefault(last - first, []).append(ring)
    else:
        for line in range(rows + columns - 1):
            top = max(0, line - columns + 1)
            for first, last in format.sequences(min(rows - 1, line) - top + 1):
                row = torch.arange(top + first, top + last)
                found.setdefault(last - first, []).append((row * columns + line - row).unsqueeze(1))
    for rings in found.values():
        yield torch.cat(rings, 1)


def _build(format: NumberFormat, scale: Tensor, zero: Tensor | None) -> Levels:
    assert isinstance(format, TrellisFormat)
    return TrellisLevels(format, scale)


register_levels(TrellisFormat, _build)
