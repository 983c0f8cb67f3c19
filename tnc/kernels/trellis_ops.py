"""``tnc::trellis``: a trellis-coded weight and L R as one operator for autograd, ``torch.compile`` and graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.formats import TrellisFormat
from tnc.kernels.trellis_fixes import Stream
from tnc.kernels.trellis_launch import Coded, rebuild, tile, vector
from tnc.kernels.trellis_words import UNITS, TrellisWords

VECTOR_TOKENS = 2  # up to here float32 FMA
TILE_TOKENS = 32  # up to here one fused launch; more rebuild the weight once and multiply


def stream_of(rows: int, columns: int, format: TrellisFormat) -> Stream:
    """The layout of a weight."""
    return Stream(TrellisWords(format, rows, columns, 16))


def dense(coded: Coded, dtype: torch.dtype) -> Tensor:
    """W by torch alone, in ``dtype`` or float32, whichever is wider: for dtypes no kernel takes."""
    dtype = torch.promote_types(dtype, torch.float32)
    rows, columns, _ = coded.shape
    format = TrellisFormat(coded.bits, coded.state_bits, length=coded.length, path="diagonal")
    codes = stream_of(rows, columns, format).codes(coded.stream)
    return coded.steps.to(dtype).unsqueeze(1) * format.decode(codes, None, dtype) / UNITS["1mad"]


def run(x: Tensor, coded: Coded) -> Tensor:
    """(tokens, in_features) to (tokens, out_features): the kernel for so many tokens."""
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty(0, coded.shape[0])
    if x.dtype != torch.float64 and tokens <= VECTOR_TOKENS:
        return vector(x, coded)
    if x.dtype not in (torch.float64, torch.float32) and tokens <= TILE_TOKENS:
        return tile(x, coded)
    weight = dense(coded, x.dtype) if x.dtype == torch.float64 else rebuild(coded, x.dtype)
    y = linear(x, weight)
    left, right = coded.left.to(x.dtype), coded.right.to(x.dtype)
    return y + linear(linear(x, right), left) if coded.shape[2] else y


@torch.library.custom_op("tnc::trellis", mutates_args=())
def trellis(
    x: Tensor, stream: Tensor, firsts: Tensor, items: Tensor, fixes: Tensor, steps: Tensor, left: Tensor, right: Tensor,
    bits: int, state_bits: int, length: int,
) -> Tensor:  # fmt: skip
    """``x (W + L R)^T`` for x (tokens, in_features); the rest as in `Coded`."""
    return run(x.contiguous(), Coded(stream, firsts, items, fixes, steps, left.contiguous(), right.contiguous(), bits,
                                     state_bits, length))  # fmt: skip


@trellis.register_fake
def _(
    x: Tensor, stream: Tensor, firsts: Tensor, items: Tensor, fixes: Tensor, steps: Tensor, left: Tensor, right: Tensor,
    bits: int, state_bits: int, length: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], steps.shape[0])


@torch.library.custom_op("tnc::trellis_weight", mutates_args=())
def trellis_weight(
    like: Tensor, stream: Tensor, firsts: Tensor, items: Tensor, fixes: Tensor, steps: Tensor, left: Tensor,
    right: Tensor, bits: int, state_bits: int, length: int,
) -> Tensor:  # fmt: skip
    """W alone in the dtype of ``like``."""
    coded = Coded(stream, firsts, items, fixes, steps, left, right, bits, state_bits, length)
    return dense(coded, like.dtype) if like.dtype == torch.float64 else rebuild(coded, like.dtype)


@trellis_weight.register_fake
def _(
    like: Tensor, stream: Tensor, firsts: Tensor, items: Tensor, fixes: Tensor, steps: Tensor, left: Tensor,
    right: Tensor, bits: int, state_bits: int, length: int,
) -> Tensor:  # fmt: skip
    return like.new_empty(steps.shape[0], right.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[:8])
    ctx.numbers = inputs[8:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, *coded, left, right = ctx.saved_tensors
    wants_x, *_, wants_left, wants_right = ctx.needs_input_grad[:8]
    back = grad @ left.to(grad.dtype)  # (tokens, rank)
    to_x = grad @ trellis_weight(grad, *coded, left, right, *ctx.numbers) + back @ right.to(grad.dtype)
    to_left = (grad.T @ linear(x, right.to(x.dtype))).to(left.dtype) if wants_left else None
    to_right = (back.T @ x).to(right.dtype) if wants_right else None
    return to_x if wants_x else None, None, None, None, None, None, to_left, to_right, None, None, None


trellis.register_autograd(_backward, setup_context=_setup)
