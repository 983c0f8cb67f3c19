"""The best scales for given codes: a linear least-squares problem in the metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tnc.formats import Layout
from tnc.quant.grid import Grid
from tnc.terms import Quantized

_STEPS = 12  # conjugate gradients from the present scales; later sweeps go on from there


def refit_scales(weight: Tensor, term: Quantized, pull: Callable[[Tensor], Tensor]) -> Quantized:
    """The term with scales refitted to its codes, then stored as its format says.

    With levels ``L`` in units of the scale, ``‖W − s·L‖²`` is quadratic in the scales ``s``; conjugate gradients
    preconditioned by the diagonal. Scales that would not stay positive keep their value. Storage may round
    scales for the worse: keep the better of the two terms.

    Args:
        weight: (m, n) float32.
        term: codes and present scales.
        pull: ``E -> G E H`` in float32, linear and positive semidefinite.

    Cost: ``_STEPS + 2`` applications of ``pull``.
    """
    layout, grid = term.layout, Grid.of(term)
    present = grid.scales(torch.float32)
    values = term.to_dense().float()
    spread = _cut(layout.spread(present), weight)
    units = torch.where(spread == 0, 0, values / spread.masked_fill(spread == 0, 1))  # levels in units of the scale
    scales = present + _solve(weight - values, units, layout, pull)
    scales = torch.where((scales > 0) & scales.isfinite() & (present > 0), scales, present)
    return replace(term, scale=with_scales(grid, scales, layout).scale)


def with_scales(grid: Grid, scales: Tensor, layout: Layout) -> Grid:
    """The grid with other real scales (block rows, groups), stored as its format says; second-level scales are kept.

    Scales beyond the largest number of their storage are stored as that number.
    """
    kind, dtype = grid.format.scales, grid.scale.dtype
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 2.0**127
    outer = None if grid.outer is None else kind.spread(grid.outer, layout.blocks)
    return replace(grid, scale=kind.store(scales.clamp_max(largest), outer, dtype))


def _solve(error: Tensor, units: Tensor, layout: Layout, pull: Callable[[Tensor], Tensor]) -> Tensor:
    """Change of the scales (block rows, groups) that takes the most out of the error."""

    def gather(matrix: Tensor) -> Tensor:
        return layout.tiles(matrix * units).sum(-1)

    def apply(change: Tensor) -> Tensor:
        return gather(pull(_cut(layout.spread(change), units) * units))

    residual = gather(pull(error))
    energy = layout.tiles(units.square()).sum(-1)  # preconditioner: the metric's diagonal is near flat inside a block
    divisor = energy.masked_fill(energy == 0, torch.inf)
    found, direction = torch.zeros_like(residual), residual / divisor
    dot = float((residual * direction).sum())
    for _ in range(_STEPS):
        image = apply(direction)
        curvature = float((direction * image).sum())
        if not (curvature > 0 and dot > 0):
            break
        found = found + direction * (dot / curvature)
        residual = residual - image * (dot / curvature)
        conditioned = residual / divisor
        previous, dot = dot, float((residual * conditioned).sum())
        direction = conditioned + direction * (dot / previous)
    return found


def _cut(spread: Tensor, like: Tensor) -> Tensor:
    return spread[:, : like.shape[1]]
