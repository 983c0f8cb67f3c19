"""`Diagonal`: a square diagonal matrix, stored as its vector (activation scaling)."""

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
class Diagonal(Expression):
    """``diag(vector)`` with vector (features,)."""

    vector: Tensor
    kind: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if self.vector.ndim != 1:
            raise ShapeError(f"Diagonal got shape {tuple(self.vector.shape)}; expected a vector (features,).")

    @property
    def shape(self) -> tuple[int, int]:
        """(features, features)."""
        return self.vector.shape[0], self.vector.shape[0]

    def to_dense(self) -> Tensor:
        """The square matrix, at least float32."""
        return torch.diag(self.vector.to(wide(self.vector)))

    def linear(self, x: Tensor) -> Tensor:
        """``x * vector``."""
        return x * self.vector.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """``vector``."""
        return {"vector": self.vector}

    def spec(self) -> Spec:
        """Kind and shape."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Diagonal:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["vector"])
