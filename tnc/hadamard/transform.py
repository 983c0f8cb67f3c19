"""The fast Hadamard transform: a few small matrix products instead of one large one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.hadamard.constructions import hadamard_matrix
from tnc.hadamard.orders import hadamard_factors

_RADIX = 32  # largest Sylvester matrix multiplied at once; see benchmarks/cases/hadamard.py


def hadamard_transform(x: Tensor, factors: Sequence[int] | None = None, *, transposed: bool = False) -> Tensor:
    """``x @ Mᵀ / sqrt(b)`` over the last axis, block by block: the orthonormal Hadamard transform.

    ``M = M_f1 ⊗ M_f2 ⊗ ...`` is the Hadamard matrix of order ``b = f1 f2 ...`` (`hadamard_matrix` of each
    factor), applied to each of the ``n / b`` consecutive blocks of the last axis.

    Args:
        x: (..., n), any float dtype; computed in float32, in float64 for float64, and rounded once.
        factors: orders of the Kronecker factors; ``None`` takes `hadamard_factors` of n.
        transposed: multiply by ``M`` in the place of ``Mᵀ``: the inverse.

    Returns:
        (..., n) in the dtype of ``x``.

    Raises:
        ShapeError: if no Hadamard matrix of order n is known, or ``b`` does not divide n.

    Cost: ``2 n sum(radices)`` flops a row, where a power of two counts as factors of at most 32 each:
    O(n log n). Differentiable; one node of the graph under ``torch.compile`` and ``torch.export``.
    """
    size = x.shape[-1]
    found = hadamard_factors(size) if factors is None else tuple(factors)
    if found is None or size % prod(found):
        raise ShapeError(
            f"hadamard_transform got x of shape {tuple(x.shape)} and factors {found}; expected a last axis that "
            "their product divides. Take the factors from tnc.hadamard.block_factors(size)."
        )
    result: Tensor = _transform(x, list(found), transposed)
    return result


def transform_flops(size: int, factors: Sequence[int]) -> int:
    """Operations of `hadamard_transform` on one row of ``size`` entries."""
    return 2 * size * sum(_radices(tuple(factors)))


@torch.library.custom_op("tnc::hadamard_transform", mutates_args=())
def _transform(x: Tensor, factors: list[int], transposed: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    radices = _radices(tuple(factors))
    if x.numel() == 0 or not radices:
        return x.clone(memory_format=torch.contiguous_format)
    y = x.to(dtype).reshape(-1, prod(radices))
    for radix in reversed(radices):  # the last axis is transformed and goes first: after all, the order is back
        matrix = _unit_matrix(radix, dtype, x.device)
        y = torch.matmul(matrix.T if transposed else matrix, y.reshape(y.shape[0], -1, radix).mT).flatten(1)
    return y.reshape(x.shape).to(x.dtype).contiguous()


@_transform.register_fake
def _(x: Tensor, factors: list[int], transposed: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, list[int], bool], output: Tensor) -> None:
    _, ctx.factors, ctx.transposed = inputs  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _transform(gradient, ctx.factors, not ctx.transposed), None, None  # type: ignore[attr-defined]


_transform.register_autograd(_backward, setup_context=_keep)


@lru_cache(maxsize=256)
def _radices(factors: tuple[int, ...]) -> tuple[int, ...]:
    """The factors with powers of two split into nearly equal ones of at most `_RADIX`, without ones."""
    radices: list[int] = []
    for factor in factors:
        bits = factor.bit_length() - 1
        if factor & (factor - 1):
            radices.append(factor)
        elif bits:
            parts = -(-bits // (_RADIX.bit_length() - 1))
            radices += [1 << (bits // parts + (i < bits % parts)) for i in range(parts)]
    return tuple(radices)


@lru_cache(maxsize=64)
def _unit_matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthogonal matrix ``M / sqrt(order)``."""
    unit: Tensor = (hadamard_matrix(order).double() / order**0.5).to(device, dtype)
    return unit
