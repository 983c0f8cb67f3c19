"""``tnc::hadamard``: a rotation in one launch on a GPU, its signs included.

A block of order ``b = p q`` is a matrix (p, q), and ``M_b = M_p ⊗ M_q`` acts on it from both sides: two small products
on the tensor cores in the place of ``log b`` passes. Factors are cut where p and q are nearest each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from tnc.hadamard import hadamard_matrix
from tnc.kernels.applied import FUSED
from tnc.kernels.hadamard_kernels import hadamard as hadamard_kernel
from tnc.kernels.launch import INTERPRETED, early, on_its_device, overlaps, tile_of
from tnc.kernels.table import Tensors
from tnc.terms import Hadamard, Spec

MOST = 256  # rows of the larger of the two matrices: blocks to 65536
_COLUMNS, _STEP = 16, 64  # of a block that a program takes, and of a product a step
_MANY = 64  # tokens from where a program takes twice as many columns


@lru_cache(maxsize=1024)
def sides(factors: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The factors of p and those of q, powers of two cut anywhere; ``None`` if one side exceeds `MOST`."""
    parts = [part for f in factors for part in ((2,) * (f.bit_length() - 1) if f & (f - 1) == 0 else (f,))]
    cut = min(range(len(parts) + 1), key=lambda i: max(prod(parts[:i]), prod(parts[i:])))
    left, right = tuple(parts[:cut]), tuple(parts[cut:])
    return None if max(prod(left), prod(right)) > MOST else (left, right)


@lru_cache(maxsize=256)
def signs_matrix(factors: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int8) -> Tensor:
    """The Kronecker product of the factors' matrices; do not change it."""
    matrix: Tensor = reduce(torch.kron, map(hadamard_matrix, factors), torch.ones(1, 1, dtype=torch.int8))
    return matrix.contiguous().to(device, dtype)


@dataclass(frozen=True)
class Rotating:
    """A rotation as the device code takes it.

    Attributes:
        matrices: the two matrices of signs.
        form: (p, q, inverse, padded p, columns a program, columns a step).
        blocks, parts: of a token, and programs of a block.
        unit: what the product is multiplied by.
    """

    matrices: tuple[Tensor, Tensor]
    form: tuple[int, ...]
    blocks: int
    parts: int
    unit: float


def rotating(x: Tensor, columns: int, factors: tuple[int, ...], inverse: bool) -> Rotating:
    """How rows of ``columns`` in the dtype of x are rotated, for factors that have `sides`."""
    found = sides(factors)
    assert found is not None, "asked before"
    p, q = (prod(side) for side in found)
    narrow = x.dtype if x.dtype.itemsize == 2 else torch.bfloat16
    matrices = signs_matrix(found[0], x.device, torch.bfloat16), signs_matrix(found[1], x.device, narrow)
    tall = tile_of(p)
    wide = 2 * _COLUMNS if x.shape[0] >= _MANY and tall < MOST else _COLUMNS
    form = (p, q, int(inverse), tall, wide, min(_STEP if tall < MOST else _STEP // 2, tile_of(q)))
    return Rotating(matrices, form, columns // (p * q), ceil(q / wide), (p * q) ** -0.5)


@on_its_device
def _launch(x: Tensor, signs: Tensor, factors: tuple[int, ...], inverse: bool) -> Tensor:
    how = rotating(x, x.shape[-1], factors, inverse)
    y, pdl = torch.empty_like(x), overlaps(x.device)
    hadamard_kernel[(x.shape[0] * how.blocks, how.parts)](
        x, y, (None, None, signs, *how.matrices), how.unit, x.shape[-1], how.form, INTERPRETED, pdl,
        num_warps=4 if how.form[3] < MOST else 8, **early(pdl),
    )  # fmt: skip
    return y


@torch.library.custom_op("tnc::hadamard", mutates_args=())
def hadamard(x: Tensor, signs: Tensor, factors: Sequence[int], inverse: bool) -> Tensor:
    """`tnc.terms.Hadamard` with these parts applied to x (tokens, features), in the dtype of x, rounded once."""
    narrow = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not narrow or sides(tuple(factors)) is None or x.numel() == 0:
        return Hadamard(signs, x.shape[1], tuple(factors), inverse).linear(x).clone()
    return _launch(x.contiguous(), signs, tuple(factors), inverse)


@hadamard.register_fake
def _(x: Tensor, signs: Tensor, factors: Sequence[int], inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    _, signs, ctx.factors, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    (signs,) = ctx.saved_tensors
    result: Tensor = hadamard(grad, signs, ctx.factors, not ctx.inverse)
    return result, None, None, None


hadamard.register_autograd(_backward, setup_context=_setup)


def _fused(spec: Spec, tensors: Tensors, x: Tensor) -> Tensor:
    result: Tensor = hadamard(x, tensors["signs"], spec["factors"], spec["transposed"])
    return result


FUSED["hadamard"] = _fused
