"""Fit a `Grid` to a weight: range of every group, 16-bit scales, search for the best clipped range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import Layout, NumberFormat
from tnc.quant.grid import Grid, working_dtype
from tnc.quant.levels import levels_of

CLIP_RATIOS: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Candidate ranges of a group, as ratios of its full range."""


_CHUNK = 1 << 18  # entries searched at a time; 2 to 5 times faster than 4096 x 4096 at once, one CPU core


def fit_grid(
    weight: Tensor,
    format: NumberFormat,
    *,
    importance: Tensor | None = None,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
) -> Grid:
    """The grid of every group, its range chosen among ``clip_ratios`` by the rounding error it leaves.

    The full range of a group is ``[min(w, 0), max(w, 0)]``. Asymmetric integers: ``2**bits - 1`` steps span it
    and the zero is rounded to an integer. Symmetric: the zero is ``h = 2**(bits-1)``, levels run from ``-h`` to
    ``h - 1``, and ``scale = max(max(w) / (h - 1), -min(w) / h)`` is the smallest that represents both ends.
    Tables: the smallest scale whose largest and smallest levels reach both ends; ternary: the mean of ``|w|``
    (BitNet b1.58, arXiv:2402.17764), and in a search up to twice that.
    A ratio ``c`` shrinks the range to ``c`` times itself; each group takes the ratio of least
    ``sum_j importance_j (w_j - q_j)²``, the earlier one of equals, so with 1.0 first no group gets worse.

    Scales are stored as the format says. By default (``scale="half"``) that is float16 if every nonzero
    full-range scale lies in float16's normal range (6.1e-5 to 65504), else bfloat16; scales that would be
    subnormal are raised to the smallest normal number.

    Args:
        weight: (m, n) finite, any float dtype; computed in float32, in float64 for float64.
        format: number format; its group size divides n.
        importance: (n,) weights at least 0 of the squared errors, such as ``diag(H)``; ``None`` is all ones.
        clip_ratios: candidates in (0, 1]; ``(1.0,)`` is no search.

    Raises:
        FormatError: for ratios outside (0, 1] or none, or weights too large for a bfloat16 scale.

    Cost: about ten passes over the weight a ratio.
    Source: weight clipping by search as AWQ (arXiv:2306.00978) does, here on ``diag(H)`` and for every group.
    """
    _check_ratios(clip_ratios)
    layout = format.layout((weight.shape[0], weight.shape[1]))
    tiles = layout.tiles(weight.to(working_dtype(weight)))  # (block rows, groups, entries of a block)
    blocks = _Blocks.of(tiles, format)
    ratios = format.clip_factors(tuple(clip_ratios))
    share = None if importance is None or len(ratios) == 1 else _share(importance, layout, tiles)
    step = max(1, _CHUNK // (tiles.shape[1] * tiles.shape[2]))
    found = [_search(ratios, part, share) for part in blocks.split(step)]
    zero = None if found[0].zero is None else torch.cat([each.zero for each in found if each.zero is not None])
    return Grid(torch.cat([each.scale for each in found]), zero, format, blocks.outer)


@dataclass(frozen=True)
class _Blocks:
    """Some block rows of a weight, and everything about their scales that does not depend on the clipping.

    Attributes:
        tiles: (rows, groups, entries).
        unit: (rows, groups) scale of the full range.
        low: (rows, groups) lower end of the full range.
        format: number format.
        stored: dtype of stored scales.
        outer: second-level scales of the whole weight, or ``None``.
        spread: (rows, groups) second-level scale of every block, or ``None``.
    """

    tiles: Tensor
    unit: Tensor
    low: Tensor
    format: NumberFormat
    stored: torch.dtype
    outer: Tensor | None
    spread: Tensor | None

    @classmethod
    def of(cls, tiles: Tensor, format: NumberFormat) -> _Blocks:
        """All blocks of a weight."""
        low, high = tiles.amin(-1).clamp_max(0), tiles.amax(-1).clamp_min(0)
        unit = format.full_scale(tiles, low, high)
        outer = format.scales.outer(unit)
        spread = None if outer is None else format.scales.spread(outer, (unit.shape[0], unit.shape[1]))
        return cls(tiles, unit, low, format, format.scales.dtype_for(unit), outer, spread)

    def split(self, rows: int) -> Iterator[_Blocks]:
        """The same blocks, some rows at a time."""
        for start in range(0, len(self.unit), rows):
            part = slice(start, start + rows)
            spread = None if self.spread is None else self.spread[part]
            yield replace(self, tiles=self.tiles[part], unit=self.unit[part], low=self.low[part], spread=spread)

    def clipped(self, ratio: float) -> _Candidate:
        """Scales and zero points of one ratio."""
        format = self.format
        scale = format.scales.store(self.unit * ratio, self.spread, self.stored)
        real = format.scales.load(scale, self.spread, self.unit.dtype)
        if format.middle is None:
            return _Candidate(scale, None, real)
        if not format.has_zero:
            return _Candidate(scale, torch.full_like(scale, format.middle, dtype=torch.uint8), real)
        divisor = real.masked_fill(real == 0, torch.inf)
        zero = torch.round(-self.low * ratio / divisor).clamp(0, format.levels - 1)
        return _Candidate(scale, zero.to(torch.uint8), real)


@dataclass(frozen=True)
class _Candidate:
    """Stored scales, zero points, and the real scales in the working dtype."""

    scale: Tensor
    zero: Tensor | None
    real: Tensor

    def error(self, blocks: _Blocks, share: Tensor | None) -> Tensor:
        """Weighted squared error (rows, groups) in units of the full-range scale: squares cannot underflow."""
        zero = None if self.zero is None else self.zero.unsqueeze(-1).to(self.real.dtype)
        levels = levels_of(blocks.format, self.real.unsqueeze(-1), zero)
        error = blocks.tiles - levels.values(levels.nearest(blocks.tiles))
        squared = (error / blocks.unit.masked_fill(blocks.unit == 0, torch.inf).unsqueeze(-1)).square()
        return squared.sum(-1) if share is None else (squared * share).sum(-1)

    def where(self, better: Tensor, other: _Candidate) -> _Candidate:
        """The candidate itself for the blocks where it is better, else the other."""
        zero = None if self.zero is None or other.zero is None else torch.where(better, self.zero, other.zero)
        return _Candidate(
            torch.where(better, self.scale, other.scale), zero, torch.where(better, self.real, other.real)
        )


def _search(ratios: tuple[float, ...], blocks: _Blocks, share: Tensor | None) -> _Candidate:
    """The best candidate of every block."""
    best = blocks.clipped(ratios[0])
    if len(ratios) == 1:
        return best
    least = best.error(blocks, share)
    for ratio in ratios[1:]:
        candidate = blocks.clipped(ratio)
        error = candidate.error(blocks, share)
        better = error < least
        best, least = candidate.where(better, best), torch.where(better, error, least)
    return best


def _share(importance: Tensor, layout: Layout, tiles: Tensor) -> Tensor:
    """Importance (groups, entries) relative to the largest of its group; only ratios within a group matter."""
    wide = layout.shares(importance.to(device=tiles.device, dtype=torch.float64).clamp_min(0))
    largest = wide.amax(-1, keepdim=True)
    return (wide / largest.masked_fill(largest == 0, torch.inf)).to(tiles.dtype)


def _check_ratios(ratios: Sequence[float]) -> None:
    if len(ratios) == 0 or not all(0 < ratio <= 1 for ratio in ratios):
        raise FormatError(
            f"clip_ratios={tuple(ratios)} must be one or more ratios with 0 < ratio <= 1; "
            "use (1.0,) for no clipping, or leave the default."
        )
