"""`Sparse`: the nonzero entries of a matrix and one bit a place: unstructured and 2:4 patterns alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.errors import ShapeError
from tnc.formats import pack, packed_length, unpack
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class Sparse(Expression):
    """Entries at the places marked in a bit mask, zeros elsewhere.

    A 2:4 pattern takes 8 bits a weight beside the mask's one, as it would with two-bit indices.

    Attributes:
        values: (nonzeros,) any float dtype, row by row.
        mask: (out_features, packed_length(in_features, 1)) uint8, least significant bit first.
        in_features: columns of the matrix (the last byte of a row may be padded).
    """

    values: Tensor
    mask: Tensor
    in_features: int
    kind: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        expected = (self.mask.shape[0], packed_length(self.in_features, 1))
        if self.values.ndim != 1 or tuple(self.mask.shape) != expected:
            raise ShapeError(
                f"Sparse got values {tuple(self.values.shape)} and mask {tuple(self.mask.shape)}; expected a vector "
                f"and a mask {expected} for in_features={self.in_features}. Build it with Sparse.of."
            )

    @classmethod
    def of(cls, matrix: Tensor) -> Sparse:
        """The nonzero entries of ``matrix`` (out_features, in_features), in its dtype; exact.

        Raises:
            ShapeError: if it is not a floating-point matrix.
        """
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ShapeError(
                f"Sparse.of got a {matrix.dtype} tensor of shape {tuple(matrix.shape)}; expected a floating-point "
                "matrix (out_features, in_features)."
            )
        nonzero = matrix != 0
        return cls(matrix[nonzero].clone(), pack(nonzero.to(torch.uint8), 1), matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.mask.shape[0], self.in_features

    @property
    def density(self) -> float:
        """Share of the entries that are stored."""
        return self.values.numel() / max(self.shape[0] * self.shape[1], 1)

    def places(self) -> Tensor:
        """(out_features, in_features) bool: where the entries stand."""
        return unpack(self.mask, 1, self.in_features).bool()

    def to_dense(self) -> Tensor:
        """The matrix with its zeros, at least float32."""
        values = self.values.to(wide(self.values))
        return values.new_zeros(self.shape).masked_scatter(self.places(), values)

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T``."""
        return linear(x, self.to_dense().to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``values`` and ``mask``."""
        return {"values": self.values, "mask": self.mask}

    def spec(self) -> Spec:
        """Kind and shape."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Sparse:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["values"], tensors["mask"], spec["shape"][1])
