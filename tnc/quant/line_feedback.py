"""Feedback ``(Uᵀ E V)_ij - E_ij`` to one anti-diagonal of a matrix after another, most of it by matrix products.

With ``S = E V`` entry (i, j) gets ``sum_l<j E_il V_lj`` and ``sum_k<i U_ki S_kj``, all of lines before its own. Lines
go in bands: what lines before a band add to all of it is two products a block of rows; what lines of one band add to
one another comes from few neighbours, at most the band's width on each side.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def line_rows(shape: tuple[int, int], number: int) -> slice:
    """Rows of the entries of an anti-diagonal, ``i + j = number``."""
    rows, columns = shape
    return slice(max(0, number - columns + 1), min(rows, number + 1))


def line_of(matrix: Tensor, number: int) -> Tensor:
    """View of the entries of an anti-diagonal of a contiguous matrix, rows rising."""
    rows, columns = line_rows((matrix.shape[0], matrix.shape[1]), number), matrix.shape[1]
    start = matrix.storage_offset() + number + rows.start * (columns - 1)
    return matrix.as_strided((rows.stop - rows.start,), (columns - 1,), start)


class LineFeedback:
    """Feedback of a matrix (m, n) whose lines are rounded in turn: `targets`, then `record`, line by line.

    Args:
        upper: U (m, m), unit upper triangular; ``None`` is the identity.
        right: V (n, n), unit upper triangular, in the same dtype.
        rows: m.
        width: lines of a band; changes speed and float rounding only.

    Cost: ``2 m n (m + n)`` flops in products, ``4 m n width`` outside of them.
    """

    def __init__(self, upper: Tensor | None, right: Tensor, rows: int, width: int) -> None:
        columns, self._width, self._margin = len(right), width, 2 * width
        self._shape = rows, columns
        self._errors = right.new_zeros(rows, columns)
        self._summed = right.new_zeros(rows, columns + 2 * self._margin)  # S between margins of 0
        self._upper, self._right = upper, pad(right, (self._margin, self._margin))
        self._above = None if upper is None else _before(upper, width)
        self._beside = _before(right, width).flip(1)
        self._band_errors = right.new_zeros(width, rows)
        self._band_summed = right.new_zeros(width, columns)  # columns last first
        self._far = right.new_zeros(2, rows, width)  # of earlier bands: by E and by S
        self._own = right.new_zeros(0)  # sum_l<j E_il V_lj of the line asked for last

    def targets(self, number: int) -> Tensor:
        """What the lines before an anti-diagonal feed back to its entries, rows rising."""
        place = number % self._width
        if place == 0:
            self._begin(number)
        rows, columns = self._slices(number)
        near = (self._band_errors[:place, rows] * self._beside[self._width - place :, columns]).sum(0)
        self._own = self._far[0, rows, place] + near
        if self._above is None:
            return self._own
        near = (self._band_summed[:place, columns] * self._above[self._width - place :, rows]).sum(0)
        return self._own + self._far[1, rows, place] + near

    def record(self, number: int, error: Tensor) -> None:
        """E of the anti-diagonal whose `targets` were asked for last."""
        rows, columns = self._slices(number)
        place = number % self._width
        self._band_errors[place, rows] = error
        line_of(self._errors, number).copy_(error)
        if self._upper is not None:
            self._band_summed[place, columns] = total = self._own + error
            self._line_of_sums(number, rows).copy_(total)

    def _line_of_sums(self, number: int, rows: slice) -> Tensor:
        step = self._summed.shape[1] - 1
        return self._summed.as_strided((rows.stop - rows.start,), (step,), self._margin + number + rows.start * step)

    def _begin(self, number: int) -> None:
        """Start a band: what all lines before add to its entries."""
        self._band_errors.zero_()
        self._band_summed.zero_()
        self._far.zero_()
        (height, length), width = self._shape, self._width
        for top in range(0, height, width):
            first = number - top - width + 1  # of the columns that the band has in this block of rows
            if first >= length or first + 2 * width - 1 <= 0:
                continue
            rows = slice(top, min(top + width, height))
            columns = slice(first + self._margin, first + self._margin + 2 * width - 1)
            done = min(max(number - top, 0), length)
            self._far[0, rows] = _slanted(self._errors[rows, :done] @ self._right[:done, columns], width)
            if self._upper is not None:
                above = self._upper[: rows.stop, rows].T @ self._summed[: rows.stop, columns]
                self._far[1, rows] = _slanted(above, width)

    def _slices(self, number: int) -> tuple[slice, slice]:
        """Rows of a line, and its columns counted from the last."""
        rows = line_rows(self._shape, number)
        shift = self._shape[1] - 1 - number
        return rows, slice(rows.start + shift, rows.stop + shift)


def _before(factor: Tensor, width: int) -> Tensor:
    """(width, n): ``factor[i - width + e, i]`` at (e, i), 0 above the matrix."""
    found = factor.new_zeros(width, len(factor))
    for back in range(1, min(width, len(factor) - 1) + 1):
        found[width - back, back:] = factor.diagonal(back)
    return found


def _slanted(block: Tensor, width: int) -> Tensor:
    """(p, width) with entry (q, d) from (q, width - 1 + d - q) of a block (p, 2 width - 1)."""
    return block.contiguous().as_strided((len(block), width), (2 * width - 2, 1), width - 1)
