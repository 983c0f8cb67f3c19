"""`Layout`: which entries of a matrix share a scale, and how many columns of codes are stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Layout:
    """A matrix cut into blocks of ``rows`` x ``columns`` entries, one scale each.

    Blocks of several rows may be cut off at the lower and right edges; groups of one row are always whole, and
    where ``stored`` exceeds the columns of the matrix the rest is padding that is stored and counted.

    Attributes:
        shape: (out_features, in_features).
        rows: rows that share a scale.
        columns: columns that share a scale.
        stored: columns of codes that are stored.
    """

    shape: tuple[int, int]
    rows: int
    columns: int
    stored: int

    @property
    def blocks(self) -> tuple[int, int]:
        """(block rows, groups): the shape of the scales."""
        return -(-self.shape[0] // self.rows), -(-self.stored // self.columns)

    def tiles(self, matrix: Tensor) -> Tensor:
        """(m, n) to (block rows, groups, rows * columns), cut-off and padding entries 0."""
        down, across = self.blocks
        if (down * self.rows, across * self.columns) != tuple(matrix.shape):
            rest = (0, across * self.columns - matrix.shape[1], 0, down * self.rows - matrix.shape[0])
            matrix = pad(matrix, rest)
        if self.rows == 1:
            return matrix.reshape(down, across, self.columns)
        return matrix.reshape(down, self.rows, across, self.columns).transpose(1, 2).reshape(down, across, -1)

    def shares(self, importance: Tensor) -> Tensor:
        """(n,) of the columns to (groups, rows * columns), in the order of `tiles`."""
        across = self.blocks[1]
        wide = pad(importance, (0, across * self.columns - len(importance))).reshape(across, 1, self.columns)
        return wide.expand(across, self.rows, self.columns).reshape(across, -1)

    def spread(self, values: Tensor) -> Tensor:
        """(block rows, groups) to (m, stored): the value of every entry's block."""
        across = values.repeat_interleave(self.columns, 1)[:, : self.stored]
        return across.repeat_interleave(self.rows, 0)[: self.shape[0]]
