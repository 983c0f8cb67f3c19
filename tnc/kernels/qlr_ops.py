"""``tnc::qlr``: Q + L R as one operator for autograd, ``torch.compile``, CUDA graphs and export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.kernels.lookup import levels_of
from tnc.kernels.qlr_launch import Packed, faster, rebuild, tile, vector
from tnc.kernels.words import codes_of, groups_of, pairs_of

VECTOR_TOKENS = 2  # up to here float32 FMA
TILE_TOKENS = 32  # up to here one fused launch; more rebuild the weight once and multiply
TALL_TOKENS, TALL_RANK = 64, 64  # a tile of 64 tokens with more ranks does not pay

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def dense(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight by torch alone, in ``dtype`` or float32, whichever is wider: for dtypes no kernel takes."""
    dtype = torch.promote_types(dtype, torch.float32)
    planes = (packed.low, packed.high) if packed.bits == 3 else (packed.low,)
    _, columns, _ = packed.shape
    codes = codes_of(planes, packed.bits, columns)
    column = torch.arange(columns, device=codes.device)
    if packed.table:
        levels = torch.tensor(levels_of(packed.table), dtype=dtype, device=codes.device)
        pair = packed.scale == "pair"
        scale = pairs_of(packed.groups) if pair else packed.groups.T.contiguous().view(torch.float32)
        weight = scale.to(dtype)[:, column // (16 if pair else packed.group)] * levels[codes.long()]
    else:
        scale, zero = groups_of(packed.groups, torch.float16 if packed.scale == "half" else torch.bfloat16)
        group = column // packed.group
        weight = scale.to(dtype)[:, group] * (codes.to(dtype) - zero.to(dtype)[:, group])
    weight = weight if packed.gain is None else weight * packed.gain.to(dtype)
    return weight + packed.left.to(dtype) @ packed.right.to(dtype)


def fused(tokens: int, dtype: torch.dtype, members: Sequence[Packed]) -> Callable[..., Tensor] | None:
    """The launch that is fastest for so many tokens of operators of one x; ``None`` where it is a multiplication."""
    if tokens == 0 or dtype == torch.float64:
        return None
    if tokens == 1 or (tokens <= VECTOR_TOKENS and (dtype == torch.float32 or faster(members[0], tokens))):
        return vector
    rank = max(packed.shape[2] for packed in members)
    tall = tokens <= TALL_TOKENS and rank <= TALL_RANK
    return tile if (tokens <= TILE_TOKENS or tall) and dtype != torch.float32 else None


def run(x: Tensor, packed: Packed) -> Tensor:
    """(tokens, in_features) to (tokens, out_features): the kernel that is fastest for this many tokens."""
    launch = fused(x.shape[0], x.dtype, (packed,))
    if launch is not None:
        return launch(x, packed)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.shape[0])
    if x.dtype == torch.float64:
        return linear(x, dense(packed, x.dtype))
    return linear(x, rebuild(packed, x.dtype))


def together(x: Tensor, members: Sequence[Packed]) -> list[Tensor] | None:
    """(tokens, out_features) of each operator that is `Packed.alike`, by one launch; ``None`` where none is fastest.

    The outputs share memory, one after another. To `TILE_TOKENS`: several t in a tall tile came out wrong on Hopper;
    what mends it (`tnc.kernels.factor_kernels.produce_tile`) was seen in machine code only.
    """
    launch = fused(x.shape[0], x.dtype, members) if x.shape[0] <= TILE_TOKENS else None
    return None if launch is None else split(launch(x, *members), x.shape[0], members)


def split(y: Tensor, tokens: int, members: Sequence[Packed]) -> list[Tensor]:
    """The outputs of a launch, (tokens, out_features) each, in the same memory."""
    parts = torch.split(y.flatten(), [tokens * packed.shape[0] for packed in members])
    return [part.view(tokens, -1) for part in parts]


@torch.library.custom_op("tnc::qlr", mutates_args=())
def qlr(
    x: Tensor, low: Tensor, high: Tensor, groups: Tensor, left: Tensor, right: Tensor, gain: Tensor | None, bits: int,
    group: int, scale: str, table: str,
) -> Tensor:  # fmt: skip
    """``x (dequant(Q) + L R)^T`` for x (tokens, in_features); the rest as in `Packed`."""
    packed = Packed(low, high, groups, left.contiguous(), right.contiguous(), bits, group, scale, table, gain)
    return run(x.contiguous(), packed)


@qlr.register_fake
def _(
    x: Tensor, low: Tensor, high: Tensor, groups: Tensor, left: Tensor, right: Tensor, gain: Tensor | None, bits: int,
    group: int, scale: str, table: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], low.shape[1])


@torch.library.custom_op("tnc::qlr_weight", mutates_args=())
def qlr_weight(
    like: Tensor, low: Tensor, high: Tensor, groups: Tensor, left: Tensor, right: Tensor, gain: Tensor | None,
    bits: int, group: int, scale: str, table: str,
) -> Tensor:  # fmt: skip
    """``dequant(Q) + L R`` in the dtype of ``like``."""
    packed = Packed(low, high, groups, left.contiguous(), right.contiguous(), bits, group, scale, table, gain)
    return dense(packed, like.dtype) if like.dtype == torch.float64 else rebuild(packed, like.dtype)


@qlr_weight.register_fake
def _(
    like: Tensor, low: Tensor, high: Tensor, groups: Tensor, left: Tensor, right: Tensor, gain: Tensor | None,
    bits: int, group: int, scale: str, table: str,
) -> Tensor:  # fmt: skip
    return like.new_empty(low.shape[1], right.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[:6])
    ctx.gain, ctx.numbers = inputs[6], inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, low, high, groups, left, right = ctx.saved_tensors
    wants_x, _, _, _, wants_left, wants_right = ctx.needs_input_grad[:6]
    to_x = grad @ qlr_weight(grad, low, high, groups, left, right, ctx.gain, *ctx.numbers) if wants_x else None
    to_left = (grad.T @ linear(x, right.to(x.dtype))).to(left.dtype) if wants_left else None
    to_right = ((grad @ left.to(x.dtype)).T @ x).to(right.dtype) if wants_right else None
    return to_x, None, None, None, to_left, to_right, None, None, None, None, None


qlr.register_autograd(_backward, setup_context=_setup)
