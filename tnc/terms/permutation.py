"""`Permutation`: rows of the identity in another order, stored as indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register


@register
@dataclass(frozen=True, eq=False)
class Permutation(Expression):
    """``(P x)[i] = x[indices[i]]``; orthogonal, so its inverse is its transpose.

    Attributes:
        indices: (features,) integers. `of` stores them in the narrowest dtype that holds them and checks them.
    """

    indices: Tensor
    kind: ClassVar[str] = "permutation"

    def __post_init__(self) -> None:
        integers = not (self.indices.is_floating_point() or self.indices.dtype == torch.bool)
        if self.indices.ndim != 1 or not integers:
            raise ShapeError(
                f"Permutation got indices {tuple(self.indices.shape)} {self.indices.dtype}; expected a vector of "
                "integers (features,). Build it with Permutation.of."
            )

    @classmethod
    def of(cls, indices: Tensor) -> Permutation:
        """The permutation that puts entry ``indices[i]`` in place i.

        Raises:
            ShapeError: if ``indices`` does not hold each of ``0 .. features - 1`` once.
        """
        size = indices.numel()
        if indices.ndim != 1 or not torch.equal(indices.long().sort().values.cpu(), torch.arange(size)):
            raise ShapeError(
                f"Permutation.of got indices of shape {tuple(indices.shape)} that are no permutation; expected each "
                "of 0 .. features - 1 once, as from torch.argsort."
            )
        return cls(indices.to(narrowest(size)))

    @property
    def shape(self) -> tuple[int, int]:
        """(features, features)."""
        return self.indices.shape[0], self.indices.shape[0]

    def inverse(self) -> Permutation:
        """The inverse, which is the transpose."""
        return Permutation(torch.argsort(self.indices.long()).to(self.indices.dtype))

    def to_dense(self) -> Tensor:
        """The matrix of zeros and ones, float32."""
        return torch.eye(self.shape[0], device=self.indices.device)[self.indices.long()]

    def linear(self, x: Tensor) -> Tensor:
        """The entries of ``x`` in their new order: no arithmetic."""
        return x.index_select(-1, self.indices.long())

    def tensors(self) -> dict[str, Tensor]:
        """``indices``."""
        return {"indices": self.indices}

    def spec(self) -> Spec:
        """Kind and shape."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Permutation:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["indices"])


def narrowest(size: int) -> torch.dtype:
    """The smallest integer dtype that holds indices below ``size``."""
    return next(d for d in (torch.uint8, torch.int16, torch.int32, torch.int64) if size - 1 <= torch.iinfo(d).max)
