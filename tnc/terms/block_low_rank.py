"""`BlockLowRank`: a grid of blocks, each of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class BlockLowRank(Expression):
    """Block (j, k) of consecutive rows and columns is ``left[j, :, k] @ right[k, j]``, of one rank everywhere.

    Attributes:
        left: (out_blocks, rows, in_blocks, rank), rows of one block.
        right: (in_blocks, out_blocks, rank, columns), columns of one block.
    """

    left: Tensor
    right: Tensor
    kind: ClassVar[str] = "block_low_rank"
    _order: ClassVar[str] = "jl"  # output legs: block, then row inside the block

    def __post_init__(self) -> None:
        fits = self.left.ndim == 4 == self.right.ndim and (
            (self.left.shape[0], *self.left.shape[2:])
            == (self.right.shape[1], self.right.shape[0], self.right.shape[2])
        )
        if not fits:
            raise ShapeError(
                f"{type(self).__name__} got left {tuple(self.left.shape)} and right {tuple(self.right.shape)}; "
                "expected (out_blocks, rows, in_blocks, rank) and (in_blocks, out_blocks, rank, columns) with the "
                "same blocks and rank."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.left.shape[0] * self.left.shape[1], self.right.shape[0] * self.right.shape[3]

    @property
    def blocks(self) -> tuple[int, int]:
        """(out_blocks, in_blocks)."""
        return self.left.shape[0], self.left.shape[2]

    @property
    def rank(self) -> int:
        """Rank of every block."""
        return self.left.shape[3]

    def to_dense(self) -> Tensor:
        """The matrix, at least float32."""
        dtype = wide(self.left, self.right)
        dense = torch.einsum(f"jlkr,kjri->{self._order}ki", self.left.to(dtype), self.right.to(dtype))
        return dense.reshape(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        """Block-diagonal times block-diagonal: ``2 rank (in_blocks out + out_blocks in)`` flops a token."""
        z = torch.einsum("...ki,kjri->...jkr", torch.unflatten(x, -1, self._legs), self.right.to(x.dtype))
        return torch.einsum(f"...jkr,jlkr->...{self._order}", z, self.left.to(x.dtype)).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        """``left`` and ``right``."""
        return {"left": self.left, "right": self.right}

    def spec(self) -> Spec:
        """Kind, shape, blocks and rank."""
        return {"kind": self.kind, "shape": list(self.shape), "blocks": list(self.blocks), "rank": self.rank}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> BlockLowRank:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["left"], tensors["right"])

    @property
    def _legs(self) -> tuple[int, int]:
        return self.right.shape[0], self.right.shape[3]
