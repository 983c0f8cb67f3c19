"""`Selection`: some entries of a vector, stored as their indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms.base import Spec, register
from tnc.terms.gather import Gather, narrowest


@register
@dataclass(frozen=True, eq=False)
class Selection(Gather):
    """``(S x)[i] = x[indices[i]]``. Behind a matrix it makes columns of it act on few inputs.

    Attributes:
        features: entries to select from.
    """

    features: int
    kind: ClassVar[str] = "selection"

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

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Selection:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["indices"], spec["shape"][1])
