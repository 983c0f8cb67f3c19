"""How a layer holds the tensors of its operator: names, order in memory, buffers that several layers share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tnc.terms import Expression, Product, Quantized, Sum


def named_tensors(expression: Expression, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, trainable) of every stored tensor."""
    if isinstance(expression, (Sum, Product)):
        for i, term in enumerate(expression.terms):
            yield from named_tensors(term, f"{prefix}{i}.")
        return
    for name, tensor in expression.tensors().items():
        yield prefix + name, tensor, tensor.is_floating_point() and not isinstance(expression, Quantized)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy without history."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def expected_dtype(operator: Expression, bias: Tensor | None) -> torch.dtype:
    """Dtype expected of ``x`` until it is known: that of the bias, else of the first floating tensor."""
    tensors = ([] if bias is None else [bias]) + list(operator.tensors().values())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def packed_name(name: str) -> str:
    """The buffer that holds a tensor of the kernel's own layout."""
    return f"packed_{name.replace('.', '_')}"


def relayout(held: Tensor, wanted: Tensor) -> None:
    """Give a held tensor the memory of ``wanted``, which has its values in another order; it stays the same object."""
    if held.data_ptr() != wanted.data_ptr() or held.stride() != wanted.stride():
        held.data = wanted.detach()


class Tie:
    """One buffer of several layers: the first one moved takes the others along."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def follow(self, moved: Tensor) -> Tensor:
        """The common buffer on the device of ``moved``."""
        if self._tensor.device != moved.device or moved.is_meta:
            self._tensor = moved
        return self._tensor
