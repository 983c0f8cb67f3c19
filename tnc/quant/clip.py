"""Fit a `Grid` to a weight: range of every group, 16-bit scales, search for the best clipped range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import IntFormat
from tnc.quant.grid import Grid, Levels, working_dtype

CLIP_RATIOS: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Candidate ranges of a group, as ratios of its full range."""


_CHUNK = 1 << 18  # entries searched at a time; 2 to 5 times faster than 4096 x 4096 at once, one CPU core


@dataclass(frozen=True)
class _Candidates:
    """Grids that differ by the ratio their range is clipped to."""

    stored: torch.dtype
    format: IntFormat
    ratios: tuple[float, ...]

    def at(self, ratio: float, unit: Tensor, low: Tensor) -> Grid:
        """The grid of one ratio, from the full-range scale and the range's lower end, both (m, groups)."""
        scale = _store(unit * ratio, self.stored)
        if self.format.symmetric:
            middle = torch.full_like(scale, self.format.levels // 2, dtype=torch.uint8)
            return Grid(scale, middle, self.format)
        divisor = scale.to(low.dtype).masked_fill(scale == 0, torch.inf)
        zero = torch.round(-low * ratio / divisor).clamp(0, self.format.levels - 1)
        return Grid(scale, zero.to(torch.uint8), self.format)


def fit_grid(
    weight: Tensor,
    format: IntFormat,
    *,
    importance: Tensor | None = None,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
) -> Grid:
    """The grid of every group, its range chosen among ``clip_ratios`` by the rounding error it leaves.

    The full range of a group is ``[min(w, 0), max(w, 0)]``. Asymmetric: ``2**bits - 1`` steps span it and the
    zero is rounded to an integer. Symmetric: the zero is ``h = 2**(bits-1)``, levels run from ``-h`` to
    ``h - 1``, and ``scale = max(max(w) / (h - 1), -min(w) / h)`` is the smallest that represents both ends.
    A ratio ``c`` shrinks the range to ``c`` times itself; each group takes the ratio of least
    ``sum_j importance_j (w_j - q_j)²``, the earlier one of equals, so with 1.0 first no group gets worse.

    Scales are stored in float16 if every nonzero full-range scale lies in float16's normal range
    (6.1e-5 to 65504), else in bfloat16; scales that would be subnormal are raised to the smallest normal
    number.

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
    wide = weight.to(working_dtype(weight))
    groups = wide.reshape(weight.shape[0], -1, format.group_of(weight.shape[1]))  # (m, groups, group)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    unit = _full_range_scale(low, high, format)
    grids = _Candidates(_storage_dtype(unit), format, tuple(clip_ratios))
    if len(clip_ratios) == 1:
        return grids.at(clip_ratios[0], unit, low)
    share = _share(importance, groups)
    rows = max(1, _CHUNK // weight.shape[1])
    parts = zip(torch.split(groups, rows), torch.split(unit, rows), torch.split(low, rows), strict=True)
    found = [_search(grids, g, u, start, share) for g, u, start in parts]
    return Grid(torch.cat([g.scale for g in found]), torch.cat([g.zero for g in found]), format)


def _search(grids: _Candidates, groups: Tensor, unit: Tensor, low: Tensor, share: Tensor | None) -> Grid:
    """The best candidate of every group of some rows: unit and low are (rows, groups)."""
    best = grids.at(grids.ratios[0], unit, low)
    least = _rounding_error(groups, unit, best.levels(groups.dtype), share)
    for ratio in grids.ratios[1:]:
        grid = grids.at(ratio, unit, low)
        error = _rounding_error(groups, unit, grid.levels(groups.dtype), share)
        better = error < least
        best, least = _choose(better, grid, best), torch.where(better, error, least)
    return best


def _full_range_scale(low: Tensor, high: Tensor, format: IntFormat) -> Tensor:
    if format.symmetric:
        half = format.levels // 2
        return torch.maximum(high / (half - 1), -low / half)
    steps = format.levels - 1
    return high / steps - low / steps  # not (high - low) / steps, which overflows for the largest float32


def _storage_dtype(scale: Tensor) -> torch.dtype:
    half = torch.finfo(torch.float16)
    normal = (scale == 0) | ((scale >= half.tiny) & (scale <= half.max))
    return torch.float16 if bool(normal.all()) else torch.bfloat16


def _store(scale: Tensor, stored: torch.dtype) -> Tensor:
    smallest = torch.finfo(stored).tiny
    rounded = torch.where(scale == 0, 0, scale.clamp_min(smallest)).to(stored)
    if not bool(torch.isfinite(rounded).all()):
        raise FormatError(
            f"weight needs a scale of {float(scale.max()):.3g}, above the largest bfloat16 "
            f"{torch.finfo(torch.bfloat16).max:.3g}; divide the weight by a constant first."
        )
    return rounded


def _rounding_error(groups: Tensor, unit: Tensor, levels: Levels, share: Tensor | None) -> Tensor:
    """Weighted squared error (m, groups) in units of the full-range scale: squares cannot underflow."""
    error = groups - levels.scale * levels.nearest(groups)
    squared = (error / unit.masked_fill(unit == 0, torch.inf).unsqueeze(-1)).square()
    return squared.sum(-1) if share is None else (squared * share).sum(-1)


def _share(importance: Tensor | None, groups: Tensor) -> Tensor | None:
    """Importance (groups, group) relative to the largest of its group; only ratios within a group matter."""
    if importance is None:
        return None
    wide = importance.to(device=groups.device, dtype=torch.float64).clamp_min(0).reshape(groups.shape[1:])
    largest = wide.amax(-1, keepdim=True)
    return (wide / largest.masked_fill(largest == 0, torch.inf)).to(groups.dtype)


def _choose(first: Tensor, a: Grid, b: Grid) -> Grid:
    return Grid(torch.where(first, a.scale, b.scale), torch.where(first, a.zero, b.zero), a.format)


def _check_ratios(ratios: Sequence[float]) -> None:
    if len(ratios) == 0 or not all(0 < ratio <= 1 for ratio in ratios):
        raise FormatError(
            f"clip_ratios={tuple(ratios)} must be one or more ratios with 0 < ratio <= 1; "
            "use (1.0,) for no clipping, or leave the default."
        )
