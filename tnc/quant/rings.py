"""Two-sided rounding with feedback, one anti-diagonal of a trellis-coded matrix at a time.

Entry (i, j) of ``Uᵀ E V``, U and V unit upper triangular, is ``E_ij`` plus terms of the errors above and to the left.
Entries of one anti-diagonal have none of each other's, so their targets are known together, and the cost of a
sequence along it is a plain weighted sum of squares, which is what Viterbi's algorithm minimises: feedback from
rows and columns at once costs a trellis nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.formats import TrellisFormat
from tnc.quant.grid import Grid
from tnc.quant.line_feedback import LineFeedback, line_of
from tnc.quant.trellis import encode_rings
from tnc.terms import Quantized


@dataclass(frozen=True, eq=False)
class Rings:
    """A weight's anti-diagonals: what their entries cost, and how they are coded.

    Attributes:
        format: with anti-diagonals as its lines.
        scale: (m, n) of every entry, float32.
        costs: (m, n) weight of every entry's squared error, float32.
    """

    format: TrellisFormat
    scale: Tensor
    costs: Tensor

    @classmethod
    def of(cls, grid: Grid, rows: Tensor, columns: Tensor) -> Rings:
        """Rings of a grid whose entry (i, j) costs ``rows_i columns_j`` a squared error, in any unit."""
        assert isinstance(grid.format, TrellisFormat)
        scale = grid.format.layout((len(rows), len(columns))).spread(grid.scales(torch.float32))
        costs = torch.outer(rows, columns).float() * scale.square()
        return cls(grid.format, scale, costs / costs.amax().clamp_min(torch.finfo(torch.float32).tiny))

    @property
    def lines(self) -> int:
        """Number of anti-diagonals."""
        return sum(self.scale.shape) - 1

    def line(self, number: int) -> tuple[Tensor, Tensor]:
        """Rows (rising by one) and columns (falling by one) of the entries of an anti-diagonal."""
        rows, columns = self.scale.shape
        row = torch.arange(max(0, number - columns + 1), min(rows - 1, number) + 1)
        return row, number - row

    def encode(self, number: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (L,) uint8 and values (L,) float32 of an anti-diagonal, nearest to ``targets`` (L,); on the CPU."""
        row, column = self.line(number)
        scale, costs = self.scale[row, column], self.costs[row, column]
        wanted, costs = (targets.float() / scale.masked_fill(scale == 0, torch.inf)).cpu(), costs.cpu()
        codes, levels = torch.empty(len(row), dtype=torch.uint8), torch.empty(len(row))
        by_length: dict[int, list[Tensor]] = {}
        for first, last in self.format.sequences(len(row)):
            by_length.setdefault(last - first, []).append(torch.arange(first, last))
        for rings in by_length.values():
            at = torch.stack(rings, 1)  # (T, B)
            codes[at] = found = encode_rings(self.format, wanted[at], costs[at])
            levels[at] = self.format.ring_levels(found)
        return codes.to(scale.device), scale * levels.to(scale.device)


def round_rings(
    weight: Tensor, rings: Rings, row_factor: Tensor | None, column_factor: Tensor, tile: int = 32
) -> Tensor:
    """Codes (m, n) uint8 such that every entry of ``Uᵀ (W - Q) V`` is that entry's own rounding error.

    Args:
        weight: (m, n) in natural order.
        rings: of the grid.
        row_factor: U (m, m), unit upper triangular; ``None`` is the identity.
        column_factor: V (n, n), unit upper triangular.
        tile: anti-diagonals that take the feedback of all before them together; changes speed and float rounding only.

    Cost: that of `LineFeedback` and the encoder's, see `encode`; float32.
    """
    weight = weight.float().contiguous()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    upper = None if row_factor is None else row_factor.float()
    feedback = LineFeedback(upper, column_factor.float(), len(weight), tile)
    for number in range(rings.lines):
        line = line_of(weight, number)
        found, values = rings.encode(number, line + feedback.targets(number))
        line_of(codes, number).copy_(found)
        feedback.record(number, line - values)
    return codes


def improve_rings(weight: Tensor, term: Quantized, rings: Rings, hessian: Tensor, gradient: Tensor | None) -> Quantized:
    """The term after every anti-diagonal was coded again with all other entries held.

    Its entries are drawn to ``q_ij + (G E H)_ij / (G_ii H_jj)``, as if they did not see each other; the line is
    changed only where that lowers ``tr(Eᵀ G E H)``, their coupling ``G_ik H_jl`` counted. Lines that a rotation made
    incoherent are coupled by little.

    Args:
        weight: (m, n) float32.
        term: on the grid of ``rings``.
        rings: with costs ``G_ii H_jj``.
        hessian: (n, n) float32.
        gradient: (m, m) float32, or ``None`` for the identity.

    Cost: ``2 m n (m + n)`` flops and the encoder's.
    """
    codes, values = term.integer_codes().clone(), term.to_dense().float().clone()
    behind = (weight - values) @ hessian  # E H
    for number in range(rings.lines):
        row, column = rings.line(number)
        old, across = values[row, column], hessian[column][:, column]
        mutual = torch.diag(across.diagonal()) if gradient is None else gradient[row][:, row] * across
        pull = behind[row, column] if gradient is None else (gradient[:, row] * behind[:, column]).sum(0)
        curvature = mutual.diagonal()
        target = old + pull / curvature.masked_fill(curvature <= 0, torch.inf)
        found, new = rings.encode(number, target)
        step = new - old
        if not float(step @ (2 * pull - mutual @ step)) > 0:
            continue
        codes[row, column], values[row, column] = found, new
        behind[row] -= step.unsqueeze(1) * hessian[column]
    return Grid.of(term).term(codes)
