"""The ``chain`` row: an operator of quantized cores by the fused kernels of its cores written out, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.kernels.launch import unsuited
from tnc.kernels.table import Bound, Kernel, Repacking, Tensors, bound_by, register_kernel, row_of
from tnc.terms import Chain, Expression, Mpo, Quantized, Spec, from_spec

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantizedCores:
    """The kernel bound to a `Chain` of quantized cores.

    Cores are written out once, by `pack`, in the 16-bit dtype of x or else in bfloat16, and held beside their codes, as
    the ``qlr`` row holds quantized factors: they are a few per cent of a weight, and decoding them in every launch
    would cost more than reading them.

    Attributes:
        spec: of the chain.
        names: of the written cores in the order of the sites.
        row: of the table, which runs them.
        kernel: that row, bound to them.
        dtype: of the written cores.
    """

    spec: Spec
    names: tuple[str, ...]
    row: str
    kernel: Bound
    dtype: torch.dtype

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors as they are, and the cores as the kernel reads them."""
        chain = from_spec(self.spec, tensors)
        assert isinstance(chain, Chain), "bound to one"
        cores = {name: core.to(self.dtype) for name, core in zip(self.names, chain.mpo().cores, strict=True)}
        return {**tensors, **(self.kernel.pack(cores) if isinstance(self.kernel, Repacking) else cores)}

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`: the tensors without the cores."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.names}

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``; ``tensors`` as `pack` gives them."""
        return self.kernel(x, {name: tensors[name] for name in self.names})

    def describe(self) -> str:
        """What runs."""
        return f"cores beside their codes, written out in 16 bits, by {self.row}: {self.kernel.describe()}"


def cores_of(chain: Chain, dtype: torch.dtype) -> Mpo:
    """An operator with the shapes of a chain; its cores have no memory."""
    shapes = [chain.core_shape(k) for k in range(len(chain.terms))]
    return Mpo(tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), chain.features)


def _written(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _HALVES else torch.bfloat16


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    if not isinstance(operator, Chain) or not all(isinstance(term, Quantized) for term in operator.terms):
        return "it runs a chain of quantized cores"
    return None


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression, device: torch.device, dtype: torch.dtype) -> QuantizedCores:
    """The kernel for an operator that is not refused."""
    assert isinstance(operator, Chain), "refused before"
    cores = cores_of(operator, _written(dtype))
    row = row_of(cores, device, dtype)
    return QuantizedCores(
        operator.spec(), tuple(cores.tensors()), row, bound_by(row, cores, device, dtype), _written(dtype)
    )


register_kernel(Kernel("chain", _serves, bind, priority=50, delegates=True))
