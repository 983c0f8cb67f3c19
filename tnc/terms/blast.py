"""`Blast`: blocks that share their bases, each with its own diagonal coupling."""

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
class Blast(Expression):
    """Block (a, b) is ``left[a] @ diag(coupling[a, b]) @ right[b]`` (BLAST, arXiv:2410.21262, equation 2).

    With one block it is a low-rank matrix; with all couplings equal, too.

    Attributes:
        left: (out_blocks, rows, rank), rows of one block.
        coupling: (out_blocks, in_blocks, rank).
        right: (in_blocks, rank, columns), columns of one block.
    """

    left: Tensor
    coupling: Tensor
    right: Tensor
    kind: ClassVar[str] = "blast"

    def __post_init__(self) -> None:
        fits = self.left.ndim == self.coupling.ndim == self.right.ndim == 3 and (
            tuple(self.coupling.shape) == (self.left.shape[0], self.right.shape[0], self.left.shape[2])
            and self.left.shape[2] == self.right.shape[1]
        )
        if not fits:
            raise ShapeError(
                f"Blast got left {tuple(self.left.shape)}, coupling {tuple(self.coupling.shape)} and right "
                f"{tuple(self.right.shape)}; expected (out_blocks, rows, rank), (out_blocks, in_blocks, rank) and "
                "(in_blocks, rank, columns) with the same blocks and rank."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.left.shape[0] * self.left.shape[1], self.right.shape[0] * self.right.shape[2]

    @property
    def blocks(self) -> tuple[int, int]:
        """(out_blocks, in_blocks)."""
        return self.coupling.shape[0], self.coupling.shape[1]

    @property
    def rank(self) -> int:
        """Columns of every basis."""
        return self.coupling.shape[2]

    def to_dense(self) -> Tensor:
        """The matrix, at least float32."""
        dtype = wide(self.left, self.coupling, self.right)
        coupled = torch.einsum("alr,abr->ablr", self.left.to(dtype), self.coupling.to(dtype))
        return torch.einsum("ablr,brc->albc", coupled, self.right.to(dtype)).reshape(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        """``2 rank (in + out + out_blocks in_blocks)`` flops a token."""
        z = torch.einsum("...bc,brc->...br", torch.unflatten(x, -1, self._legs), self.right.to(x.dtype))
        z = torch.einsum("...br,abr->...ar", z, self.coupling.to(x.dtype))
        return torch.einsum("...ar,alr->...al", z, self.left.to(x.dtype)).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        """``left``, ``coupling`` and ``right``."""
        return {"left": self.left, "coupling": self.coupling, "right": self.right}

    def spec(self) -> Spec:
        """Kind, shape, blocks and rank."""
        return {"kind": self.kind, "shape": list(self.shape), "blocks": list(self.blocks), "rank": self.rank}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Blast:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["left"], tensors["coupling"], tensors["right"])

    @property
    def _legs(self) -> tuple[int, int]:
        return self.right.shape[0], self.right.shape[2]
