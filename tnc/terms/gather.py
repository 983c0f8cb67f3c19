"""`Gather`: entries of a vector taken by their stored indices; `Permutation` takes all of them, `Selection` some."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec


@dataclass(frozen=True, eq=False)
class Gather(Expression):
    """``(S x)[i] = x[indices[i]]``: rows of the identity.

    Attributes:
        indices: (out_features,) integers. ``of`` stores them in the narrowest dtype that holds them and checks them.
    """

    indices: Tensor

    def __post_init__(self) -> None:
        integers = not (self.indices.is_floating_point() or self.indices.dtype == torch.bool)
        if self.indices.ndim != 1 or not integers:
            name = type(self).__name__
            raise ShapeError(
                f"{name} got indices {tuple(self.indices.shape)} {self.indices.dtype}; expected a vector of "
                f"integers (out_features,). Build it with {name}.of."
            )

    def to_dense(self) -> Tensor:
        """The matrix of zeros and ones, float32."""
        zeros = torch.zeros(self.shape, device=self.indices.device)
        return zeros.scatter_(1, self.indices.long().unsqueeze(1), 1.0)

    def linear(self, x: Tensor) -> Tensor:
        """The entries of ``x`` at the indices: no arithmetic."""
        return x.index_select(-1, self.indices.long())

    def tensors(self) -> dict[str, Tensor]:
        """``indices``."""
        return {"indices": self.indices}

    def spec(self) -> Spec:
        """Kind and shape."""
        return {"kind": self.kind, "shape": list(self.shape)}


def narrowest(size: int) -> torch.dtype:
    """The smallest integer dtype that holds indices below ``size``."""
    return next(d for d in (torch.uint8, torch.int16, torch.int32, torch.int64) if size - 1 <= torch.iinfo(d).max)
