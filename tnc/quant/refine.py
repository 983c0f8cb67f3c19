"""Refinement: better codes and scales for a quantized weight, never a larger error in the metric.

A sweep moves single codes where that lowers ``tr(Eᵀ G E H)``, then refits all scales with the codes held.
Codes are moved in batches that barely see each other; a batch is checked as a whole before it is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.metric import Metric
from tnc.quant.grid import Grid, check_quantizable
from tnc.quant.levels import Levels
from tnc.quant.rescale import refit_scales
from tnc.quant.rings import Rings, improve_rings
from tnc.stats import LayerStats
from tnc.terms import Quantized, dense64

_BLOCK = 128  # columns between two updates of all later columns


def refine(
    weight: Tensor, term: Quantized, stats: LayerStats | None = None, *, sweeps: int = 3, metric: Metric | None = None
) -> Quantized:
    """A quantized weight of the same format with at most the error of ``term`` in the metric.

    Coordinate descent: entry (i, j) goes to the grid point nearest to ``q_ij + (G E H)_ij / (G_ii H_jj)``, the best
    value with all other entries held. Without G a batch is one column, whose rows are independent. With G it
    holds one entry of every row, coupled by ``G_ik H_jl``; where their moves together would take less than half the
    sum of their gains, only those are made whose own gain exceeds their coupling with all others, or else the one
    of largest gain. Scales are refitted after every sweep (`refit_scales`). Sweeps end when one brings less than 0.1 %.

    Args:
        weight: (m, n) finite, any float dtype.
        term: from any quantizer; not changed.
        stats: statistics of the layer; the metric is ``G ⊗ H``, ``H`` without gradients, Frobenius without both.
        sweeps: at most this many, at least 0.
        metric: used instead of ``stats`` where given; sides ``None``, diagonal or full.

    Returns:
        The best of ``term`` and the results of all sweeps, as stored, measured in float64.

    Raises:
        FormatError: for ``sweeps < 0``.
        ShapeError, NonFiniteError, StatsError: as the quantizers.

    Cost a sweep: one product ``G E H``, and ``256 m`` flops a moved code with G (256 without); float32.
    Source: coordinate descent on codes, CDQuant (arXiv:2406.17542), there in H and greedy; scales for given codes
    as in its block version; the extension to ``G ⊗ H`` is ours.
    """
    check_quantizable(weight, term.format, stats)
    if sweeps < 0:
        raise FormatError(f"refine(sweeps={sweeps}) must be at least 0; 3 is usual.")
    if metric is None:
        metric = Metric() if stats is None else Metric.auto(stats)
    reference = weight.double()
    best, least = term, metric.squared_norm(reference - dense64(term))
    sides = _Sides.of(metric, weight)
    current, narrow = term, weight.float()
    for _ in range(sweeps):
        current = _swept(narrow, current, sides)
        current = refit_scales(narrow, current, sides.pull)
        error = metric.squared_norm(reference - dense64(current))
        gained = least - error
        if error < least:
            best, least = current, error
        if not gained > 1e-3 * error:
            break
    return best


@dataclass(frozen=True)
class _Sides:
    """Both sides of the metric over the means of their diagonals, float32; ``gradient`` is ``None`` for G = I."""

    gradient: Tensor | None
    hessian: Tensor

    @classmethod
    def of(cls, metric: Metric, weight: Tensor) -> _Sides:
        identity = torch.ones(weight.shape[1], device=weight.device)
        gradient = None if metric.gradient is None else _normal(metric.gradient).to(weight.device)
        return cls(gradient, _normal(identity if metric.hessian is None else metric.hessian).to(weight.device))

    def pull(self, error: Tensor) -> Tensor:
        """``G E H``: minus half the slope of the squared error."""
        return self.times_gradient(error @ self.hessian)

    def times_gradient(self, matrix: Tensor) -> Tensor:
        """``G`` times a matrix."""
        return matrix if self.gradient is None else self.gradient @ matrix

    def within(self, block: slice) -> _Sides:
        """The sides of some columns."""
        return _Sides(self.gradient, self.hessian[block, block])

    def curvature(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``G_ii H_jj`` of single entries."""
        across = self.hessian.diagonal()[columns]
        return across if self.gradient is None else self.gradient.diagonal()[rows] * across

    def coupling(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``G_ik H_jl`` between entries of a batch (K, K)."""
        assert self.gradient is not None
        return self.gradient[rows][:, rows] * self.hessian[columns][:, columns]

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and columns of entries that are moved together; all entries once."""
        down, columns = torch.arange(rows, device=self.hessian.device), len(self.hessian)
        for shift in range(columns):
            yield down, torch.full_like(down, shift) if self.gradient is None else (down + shift) % columns

    def moved(self, pull: Tensor, rows: Tensor, columns: Tensor, step: Tensor) -> None:
        """Bring ``pull`` up to date after entries grew by ``step``."""
        if self.gradient is None:
            pull[rows] -= torch.outer(step, self.hessian[columns[0]])
        else:
            pull.addmm_(self.gradient[:, rows] * step, self.hessian[columns], alpha=-1)


def _normal(side: Tensor) -> Tensor:
    full = torch.diag(side) if side.ndim == 1 else side
    mean = float(full.diagonal().mean())
    return (full / mean if mean > 0 else full).float()


def _swept(weight: Tensor, term: Quantized, sides: _Sides) -> Quantized:
    """The term after every code was looked at once, block by block of columns."""
    grid, columns = Grid.of(term), weight.shape[1]
    if not term.format.columns_alone:
        across = sides.hessian.diagonal()
        down = torch.ones(len(weight), device=weight.device) if sides.gradient is None else sides.gradient.diagonal()
        return improve_rings(weight, term, Rings.of(grid, down, across), sides.hessian, sides.gradient)
    levels = grid.levels(torch.float32, torch.arange(columns, device=weight.device), len(weight))
    values = term.to_dense().float().clone()
    pull = sides.pull(weight - values)
    for start in range(0, columns, _BLOCK):
        block, later = slice(start, start + _BLOCK), slice(start + _BLOCK, columns)
        before = values[:, block].clone()
        place = levels.at(partial(_columns, block=block))
        _sweep_block(values[:, block], pull[:, block].contiguous(), place, sides.within(block))
        change = values[:, block] - before
        pull[:, later] -= sides.times_gradient(change @ sides.hessian[block, later])
    return grid.term(levels.codes(levels.nearest(values)).to(torch.uint8))


def _sweep_block(values: Tensor, pull: Tensor, levels: Levels, sides: _Sides) -> None:
    """Move the codes of some columns; changes ``values`` and ``pull`` in place."""
    for rows, columns in sides.batches(len(values)):
        at, step = _moves(values, pull, levels, sides, (rows, columns))
        if len(at):
            rows, columns = rows[at], columns[at]
            values[rows, columns] += step
            sides.moved(pull, rows, columns, step)


def _moves(
    values: Tensor, pull: Tensor, levels: Levels, sides: _Sides, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Which entries of a batch move, and by how much."""
    curvature = sides.curvature(*batch)
    slope, old = pull[batch], values[batch]
    place = levels.at(itemgetter(batch))
    target = old + slope / curvature.masked_fill(curvature <= 0, torch.inf)
    step = place.values(place.nearest(target)) - old
    gain = step * (2 * slope - step * curvature)
    at = ((gain > 0) & (curvature > 0)).nonzero().flatten()
    if sides.gradient is None or len(at) < 2:
        return at, step[at]
    mutual = sides.coupling(batch[0][at], batch[1][at]) * torch.outer(step[at], step[at])
    mutual.diagonal().zero_()
    if float(mutual.sum()) <= 0.5 * float(gain[at].sum()):
        return at, step[at]
    alone = gain[at] > mutual.abs().sum(1)
    alone[gain[at].argmax()] |= not bool(alone.any())
    return at[alone], step[at[alone]]


def _columns(values: Tensor, *, block: slice) -> Tensor:
    return values[:, block]
