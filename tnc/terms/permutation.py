"""`Permutation`: rows of the identity in another order, stored as indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms.base import Spec, register
from tnc.terms.gather import Gather, narrowest


@register
@dataclass(frozen=True, eq=False)
class Permutation(Gather):
    """``(P x)[i] = x[indices[i]]`` with every entry once; orthogonal, so its inverse is its transpose."""

    kind: ClassVar[str] = "permutation"

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

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Permutation:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["indices"])
