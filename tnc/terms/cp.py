"""`Cp`: a sum of outer products over the modes of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class Cp(Expression):
    """The mode tensor ``(o_1..o_d, i_1..i_d)`` as ``Σ_r factor_1[:, r] ∘ ... ∘ factor_2d[:, r]``, indices row-major.

    Attributes:
        factors: 2 d matrices (mode, rank), output modes first.
    """

    factors: tuple[Tensor, ...]
    kind: ClassVar[str] = "cp"

    def __post_init__(self) -> None:
        shapes = [tuple(factor.shape) for factor in self.factors]
        if not shapes or len(shapes) % 2 or any(len(s) != 2 for s in shapes) or len({s[-1] for s in shapes}) > 1:
            raise ShapeError(
                f"Cp got factors of shapes {shapes}; expected an even number of matrices (mode, rank) of one rank, "
                "output modes first."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        modes, d = [factor.shape[0] for factor in self.factors], len(self.factors) // 2
        return prod(modes[:d]), prod(modes[d:])

    @property
    def rank(self) -> int:
        """Number of outer products."""
        return self.factors[0].shape[1]

    def to_dense(self) -> Tensor:
        """The matrix, at least float32: the Khatri–Rao products of the output and of the input factors."""
        dtype, d = wide(*self.factors), len(self.factors) // 2
        wider = [factor.to(dtype) for factor in self.factors]
        return reduce(khatri_rao, wider[:d]) @ reduce(khatri_rao, wider[d:]).T

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T``; the matrix is rebuilt and rounded once to the dtype of ``x``."""
        return linear(x, self.to_dense().to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``factor0``, ``factor1``, ..."""
        return {f"factor{k}": factor for k, factor in enumerate(self.factors)}

    def spec(self) -> Spec:
        """Kind, shape, modes and rank."""
        modes = [factor.shape[0] for factor in self.factors]
        return {"kind": self.kind, "shape": list(self.shape), "modes": modes, "rank": self.rank}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Cp:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tuple(tensors[f"factor{k}"] for k in range(len(spec["modes"]))))


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Column-wise Kronecker product (m, r), (n, r) -> (m n, r)."""
    return (a.unsqueeze(1) * b.unsqueeze(0)).flatten(0, 1)
