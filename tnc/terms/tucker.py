"""`Tucker`: a core tensor with one factor for each mode of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class Tucker(Expression):
    """The mode tensor ``(o_1..o_d, i_1..i_d)`` as ``core`` times a factor along each mode, indices row-major.

    Attributes:
        core: (r_1, ..., r_2d).
        factors: 2 d matrices (mode, r), output modes first.
    """

    core: Tensor
    factors: tuple[Tensor, ...]
    kind: ClassVar[str] = "tucker"

    def __post_init__(self) -> None:
        shapes = [tuple(factor.shape) for factor in self.factors]
        fits = all(len(s) == 2 for s in shapes) and tuple(s[-1] for s in shapes) == tuple(self.core.shape)
        if not shapes or len(shapes) % 2 or not fits:
            raise ShapeError(
                f"Tucker got a core of shape {tuple(self.core.shape)} and factors of shapes {shapes}; expected an even "
                "number of factors (mode, r), output modes first, and a core with one leg r for each."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        modes, d = [factor.shape[0] for factor in self.factors], len(self.factors) // 2
        return prod(modes[:d]), prod(modes[d:])

    @property
    def ranks(self) -> tuple[int, ...]:
        """The 2 d sizes of the core."""
        return tuple(self.core.shape)

    def to_dense(self) -> Tensor:
        """The matrix, at least float32."""
        dtype = wide(self.core, *self.factors)
        tensor = self.core.to(dtype)
        for factor in self.factors:  # the leading leg goes to the end as a mode; 2 d turns restore the order
            tensor = torch.tensordot(tensor, factor.to(dtype), dims=([0], [1]))
        return tensor.reshape(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T``; the matrix is rebuilt and rounded once to the dtype of ``x``."""
        return linear(x, self.to_dense().to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``core``, ``factor0``, ``factor1``, ..."""
        return {"core": self.core, **{f"factor{k}": factor for k, factor in enumerate(self.factors)}}

    def spec(self) -> Spec:
        """Kind, shape, modes and ranks."""
        modes = [factor.shape[0] for factor in self.factors]
        return {"kind": self.kind, "shape": list(self.shape), "modes": modes, "ranks": list(self.ranks)}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Tucker:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tensors["core"], tuple(tensors[f"factor{k}"] for k in range(len(spec["modes"]))))
