"""`Selection`: some entries of a vector, stored as their indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register
from tnc.terms.permutation import narrowest


@register
@dataclass(frozen=True, eq=False)
class Selection(Expression):
    """``(S x)[i] = x[indices[i]]``: rows of the identity. Behind a matrix it makes columns of it act on few inputs.

    Attributes:
        indices: (count,) integers. `of` stores them in the narrowest dtype that holds them and checks them.
        features: entries to select from.
    """

    indices: Tensor
    features: int
    kind: ClassVar[str] = "selection"

    def __post_init__(self) -> None:
        integers = not (self.indices.is_floating_point() or self.indices.dtype == torch.bool)
        if self.indices.ndim != 1 or not integers:
            raise ShapeError(
                f"Selection got indices {tuple(self.indices.shape)} {self.indices.dtype}; expected a vector of "
                "integers (count,). Build it with Selection.of."
            )

    @classmethod
    def of(cls, indices: Tensor, features: int) -> Selection:
        """The selection of the entries ``indices`` (count,), in this order, of ``features``.

        Raises:
            ShapeError: for no vector, or an index outside ``0 .. features - 1``.
        """
        if indices.ndim != 1 or bool(((indices < 0) | (indices >= features)).any()):
            raise ShapeError(
                f"Selection.of got indices of shape {tuple(indices.shape)} for {features} features; expected a vector "
                f"of integers from 0 to {features - 1}."
            )
        return cls(indices.to(narrowest(features)), features)

    @property
    def shape(self) -> tuple[int, int]:
        """(count, features)."""
        return self.indices.shape[0], self.features

    def to_dense(self) -> Tensor:
        """The matrix of zeros and ones, float32."""
        return one_hot(self.indices.long(), self.features).float()

    def linear(self, x: Tensor) -> Tensor:
        """The selected entries of ``x``: no arithmetic."""
        return x.index_select(-1, self.indices.long())

    def tensors(self) -> dict[str, Tensor]:
        """``indices``."""
        return {"indices": self.indices}

    def spec(self) -> Spec:
        """Kind and shape."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Selection:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["indices"], spec["shape"][1])
