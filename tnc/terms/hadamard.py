"""`Hadamard`: a randomised orthonormal Hadamard rotation, stored as its signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.formats import pack, packed_length, unpack
from tnc.hadamard import block_factors, construction, hadamard_transform
from tnc.terms.base import Expression, Spec, register


@register
@dataclass(frozen=True, eq=False)
class Hadamard(Expression):
    """``B = blockdiag(M, M, ...) diag(s) / sqrt(b)``, or ``Bᵀ``: orthogonal, applied in O(n log n).

    ``M`` is the Hadamard matrix of order ``b``, the Kronecker product of those of ``factors``
    (`tnc.hadamard.hadamard_matrix`), and s are random signs. Only the signs are stored.

    Attributes:
        signs: (ceil(features / 8),) uint8, one bit a sign, 1 for -1.
        features: n.
        factors: orders of the Kronecker factors; their product ``b`` divides n.
        transposed: whether the term is ``Bᵀ``.

    Raises:
        ShapeError: if the signs are not n packed bits, or ``b`` does not divide n or is no known order.
    """

    signs: Tensor
    features: int
    factors: tuple[int, ...]
    transposed: bool = False
    kind: ClassVar[str] = "hadamard"

    def __post_init__(self) -> None:
        expected = (packed_length(self.features, 1),)
        if tuple(self.signs.shape) != expected or self.signs.dtype != torch.uint8:
            raise ShapeError(
                f"Hadamard({self.features}) got signs {tuple(self.signs.shape)} {self.signs.dtype}; expected "
                f"{expected} torch.uint8, one bit a sign. Build it with Hadamard.random."
            )
        if not self.factors or self.features % prod(self.factors) or None in map(construction, self.factors):
            raise ShapeError(
                f"Hadamard({self.features}) got factors {self.factors}; expected orders of Hadamard matrices "
                "whose product divides the size. Take them from tnc.hadamard.block_factors."
            )

    @classmethod
    def random(cls, features: int, *, seed: int = 0) -> Hadamard:
        """A rotation with random signs and the largest blocks that ``features`` allows.

        The same size and seed give the same rotation everywhere.
        """
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(2, (features,), generator=generator)
        return cls(pack(bits, 1), features, block_factors(features))

    @property
    def shape(self) -> tuple[int, int]:
        """(features, features)."""
        return self.features, self.features

    @property
    def block(self) -> int:
        """Order ``b`` of a block."""
        return prod(self.factors)

    def inverse(self) -> Hadamard:
        """The inverse, which is the transpose; shares the stored signs."""
        return Hadamard(self.signs, self.features, self.factors, not self.transposed)

    def to_dense(self) -> Tensor:
        """The orthogonal matrix in float64: nothing stored sets a narrower dtype."""
        return self.linear(torch.eye(self.features, dtype=torch.float64, device=self.signs.device)).T

    def linear(self, x: Tensor) -> Tensor:
        """``x Bᵀ`` by the fast transform: computed in float32 or wider and rounded once to the dtype of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        signs = 1 - 2 * unpack(self.signs, 1, self.features).to(wide.dtype)
        if self.transposed:
            return (hadamard_transform(wide, self.factors, transposed=True) * signs).to(x.dtype)
        return hadamard_transform(wide * signs, self.factors).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """``signs``."""
        return {"signs": self.signs}

    def spec(self) -> Spec:
        """Kind, shape, factors and whether transposed."""
        return {
            "kind": self.kind, "shape": list(self.shape), "factors": list(self.factors),
            "transposed": self.transposed,
        }  # fmt: skip

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Hadamard:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["signs"], spec["shape"][0], tuple(spec["factors"]), spec["transposed"])
