"""`LowRank`: a product of a tall and a wide factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class LowRank(Expression):
    """``left @ right`` with left (out_features, rank) and right (rank, in_features); rank 0 is the zero matrix."""

    left: Tensor
    right: Tensor
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ShapeError(
                f"LowRank got left {tuple(self.left.shape)} and right {tuple(self.right.shape)}; "
                "expected (out_features, rank) and (rank, in_features) with one rank."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.left.shape[1]

    def to_dense(self) -> Tensor:
        """``left @ right``, at least float32."""
        dtype = wide(self.left, self.right)
        return self.left.to(dtype) @ self.right.to(dtype)

    def linear(self, x: Tensor) -> Tensor:
        """``(x @ right.T) @ left.T``: ``2 rank (in + out)`` flops a token."""
        return linear(linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``left`` and ``right``."""
        return {"left": self.left, "right": self.right}

    def spec(self) -> Spec:
        """Kind, shape and rank."""
        return {"kind": self.kind, "shape": list(self.shape), "rank": self.rank}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> LowRank:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["left"], tensors["right"])
