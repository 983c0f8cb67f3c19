"""`TensorRing`: a closed chain of four-legged cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class TensorRing(Expression):
    """``W[(o_1..o_d), (i_1..i_d)] = tr(core_1[:, o_1, i_1, :] @ ... @ core_d[:, o_d, i_d, :])``, indices row-major.

    An `Mpo` whose two ends are joined by a bond (arXiv:1606.05535); with that bond 1 it is the `Mpo`.

    Attributes:
        cores: d >= 1 tensors (r_prev, out, in, r_next); the last r_next is the first r_prev.
    """

    cores: tuple[Tensor, ...]
    kind: ClassVar[str] = "tensor_ring"

    def __post_init__(self) -> None:
        shapes = [tuple(core.shape) for core in self.cores]
        closed = [*shapes, shapes[0]] if shapes else []
        if not shapes or any(len(s) != 4 for s in shapes) or any(a[3] != b[0] for a, b in pairwise(closed)):
            raise ShapeError(
                f"TensorRing got cores of shapes {shapes}; expected (r_prev, out, in, r_next) with each r_next equal "
                "to the next r_prev, and the last to the first."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return prod(core.shape[1] for core in self.cores), prod(core.shape[2] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The d bond dimensions; the first closes the ring."""
        return tuple(core.shape[0] for core in self.cores)

    def to_dense(self) -> Tensor:
        """The matrix, at least float32: cores merged left to right, the ring closed by a trace."""
        dtype = wide(*self.cores)
        chain = self.cores[0].to(dtype)  # (r_0, o, i, r)
        for core in self.cores[1:]:
            merged = torch.einsum("aoib,bpjc->aopijc", chain, core.to(dtype))
            chain = merged.flatten(3, 4).flatten(1, 2)
        return torch.einsum("aoia->oi", chain)

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T``; the matrix is rebuilt and rounded once to the dtype of ``x``."""
        return linear(x, self.to_dense().to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``core0``, ``core1``, ..."""
        return {f"core{k}": core for k, core in enumerate(self.cores)}

    def spec(self) -> Spec:
        """Kind, shape, modes and bond dimensions."""
        return {
            "kind": self.kind, "shape": list(self.shape), "out_modes": [core.shape[1] for core in self.cores],
            "in_modes": [core.shape[2] for core in self.cores], "ranks": list(self.ranks),
        }  # fmt: skip

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> TensorRing:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tuple(tensors[f"core{k}"] for k in range(len(spec["ranks"]))))
