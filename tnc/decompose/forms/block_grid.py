"""A matrix in a grid of equal blocks, and the part of the metric that one block sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.metric import Metric


@dataclass(frozen=True)
class BlockGrid:
    """``blocks`` = (out_blocks, in_blocks) equal blocks of a (m, n) matrix."""

    shape: tuple[int, int]
    blocks: tuple[int, int]

    def __post_init__(self) -> None:
        for size, count, side in zip(self.shape, self.blocks, ("out", "in"), strict=True):
            if count < 1 or size % count:
                valid = [d for d in range(1, size + 1) if size % d == 0]
                raise ShapeError(
                    f"{count} blocks do not divide {side}_features={size} of weight {self.shape}; use one of "
                    f"{', '.join(map(str, valid))}."
                )

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of one block."""
        return self.shape[0] // self.blocks[0], self.shape[1] // self.blocks[1]

    def rows(self, j: int) -> slice:
        """Rows of block row ``j``."""
        return slice(j * self.block_shape[0], (j + 1) * self.block_shape[0])

    def columns(self, k: int) -> slice:
        """Columns of block column ``k``."""
        return slice(k * self.block_shape[1], (k + 1) * self.block_shape[1])


def block(side: Tensor | None, place: slice) -> Tensor | None:
    """The diagonal block of one side of a metric."""
    if side is None:
        return None
    return side[place] if side.ndim == 1 else side[place, place]


def spread(side: Tensor | None, place: slice, matrix: Tensor, size: int) -> Tensor:
    """``side[:, place] @ matrix`` (size, columns): what a change in one block does to all rows the metric couples."""
    if side is not None and side.ndim == 2:
        return side[:, place].to(matrix.dtype) @ matrix
    result = matrix.new_zeros(size, matrix.shape[1])
    result[place] = matrix if side is None else side[place].to(matrix.dtype).unsqueeze(1) * matrix
    return result


def couples_blocks(metric: Metric) -> bool:
    """Whether a side is a full matrix, so that the error of one block depends on the others."""
    return any(side is not None and side.ndim == 2 for side in (metric.hessian, metric.gradient))


def pseudo_inverse(side: Tensor | None, matrix: Tensor) -> Tensor:
    """``side⁺ @ matrix`` for a PSD side; directions below ``size eps`` of the largest count as unseen."""
    if side is None:
        return matrix
    floor = len(side) * torch.finfo(torch.float64).eps
    if side.ndim == 1:
        seen = side > floor * side.max()
        return torch.where(seen, 1 / torch.where(seen, side, 1.0), 0.0).unsqueeze(1) * matrix
    values, vectors = torch.linalg.eigh(side)
    seen = values > floor * values[-1].clamp_min(0)
    vectors = vectors[:, seen]
    solved: Tensor = vectors @ ((vectors.T @ matrix) / values[seen].unsqueeze(1))
    return solved
