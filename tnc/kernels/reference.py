"""The reference kernel: rebuild the matrix, multiply. The oracle of every other kernel, for ever."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.terms import Expression, Spec, from_spec


def rebuild(spec: Spec, tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """The matrix of an expression, evaluated in ``dtype`` or in float32, whichever is wider.

    Differentiable in every floating tensor; traced whole by ``torch.compile``.
    """
    if dtype == torch.float64:
        tensors = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    return from_spec(spec, tensors).to_dense()


@dataclass(frozen=True)
class Reference:
    """``linear(x, matrix)``: the matrix in float32 (float64 for float64 ``x``), rounded once."""

    spec: Spec

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), dtype of ``x``."""
        return linear(x, rebuild(self.spec, tensors, x.dtype).to(x.dtype))

    def describe(self) -> str:
        """What runs."""
        return "rebuilds the dense weight on every call"


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _bind(operator: Expression) -> Reference:
    return Reference(operator.spec())


register_kernel(Kernel("reference", _serves, _bind, priority=0))
