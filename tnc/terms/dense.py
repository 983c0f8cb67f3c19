"""`Dense`: a matrix stored as it is."""

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
class Dense(Expression):
    """A matrix (out_features, in_features), any float dtype."""

    matrix: Tensor
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ShapeError(
                f"Dense got shape {tuple(self.matrix.shape)}; expected a matrix (out_features, in_features)."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def to_dense(self) -> Tensor:
        """The matrix, at least float32."""
        return self.matrix.to(wide(self.matrix))

    def linear(self, x: Tensor) -> Tensor:
        """``x @ matrix.T``."""
        return linear(x, self.matrix.to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``matrix``."""
        return {"matrix": self.matrix}

    def spec(self) -> Spec:
        """Kind and shape."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Dense:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["matrix"])
