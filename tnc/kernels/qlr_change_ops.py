"""``tnc::qlr_changed``: Q + L R of a gathered, scaled or rotated x, for few tokens in one launch.

As `tnc.kernels.qlr_ops`; for more tokens, and dtypes that no launch takes, the change is made by itself first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.kernels.change import Change
from tnc.kernels.hadamard import sides
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import TILE_TOKENS, fused, qlr_weight, run, split

ROTATED_TOKENS, ROTATED_SIDE = 2, 64  # a rotation alone, of more, is as fast or faster in a launch of its own


def run_changed(x: Tensor, change: Change, packed: Packed) -> Tensor:
    """(tokens, in_features) to (tokens, out_features), by the fastest way."""
    (y,) = together_changed(x, change, (packed,)) or (None,)
    if y is not None:
        return y
    if not change.apart:
        return run(change.apply(x).contiguous(), packed)
    inner = linear(x, packed.right.to(x.dtype))
    return run(change.apply(x).contiguous(), without_factors(packed)) + linear(inner, packed.left.to(x.dtype))


def together_changed(x: Tensor, change: Change, members: Sequence[Packed]) -> list[Tensor] | None:
    """As `tnc.kernels.qlr_ops.together`, of the changed x; ``None`` where the change had better be made before."""
    return launched(x, change, members) if x.shape[0] <= most(change.rotation) else None


def launched(x: Tensor, change: Change, members: Sequence[Packed]) -> list[Tensor] | None:
    """(tokens, out_features) of each operator, x changed in their one launch; ``None`` where none can."""
    if x.shape[0] > TILE_TOKENS or not change.fits(x.dtype):
        return None
    launch = fused(x.shape[0], x.dtype, members)
    return None if launch is None else split(launch(x, *members, change=change), x.shape[0], members)


def most(rotation: tuple[int, ...] | None) -> int:
    """Tokens up to which a change in the launch is faster than before it.

    Args:
        rotation: factors of a rotation, if the change is one and no more.
    """
    if rotation is None:
        return TILE_TOKENS
    found = sides(rotation)
    return ROTATED_TOKENS if found is not None and max(map(prod, found)) <= ROTATED_SIDE else 0


def without_factors(packed: Packed) -> Packed:
    """The quantized term alone."""
    return replace(packed, left=packed.left[:, :0], right=packed.right[:0])


@torch.library.custom_op("tnc::qlr_changed", mutates_args=())
def qlr_changed(
    x: Tensor, order: Tensor | None, factor: Tensor | None, signs: Tensor | None, low: Tensor, high: Tensor,
    groups: Tensor, left: Tensor, right: Tensor, gain: Tensor | None, factors: Sequence[int], inverse: bool,
    apart: bool, bits: int, group: int, scale: str, table: str,
) -> Tensor:  # fmt: skip
    """``change(x) (dequant(Q) + L R)^T``, or with ``apart`` ``change(x) dequant(Q)^T + x (L R)^T``.

    x is (tokens, in_features); the rest as in `tnc.kernels.change.Change` and `Packed`.
    """
    packed = Packed(low, high, groups, left.contiguous(), right.contiguous(), bits, group, scale, table, gain)
    return run_changed(x.contiguous(), Change(order, factor, signs, tuple(factors), inverse, apart), packed)


@qlr_changed.register_fake
def _(
    x: Tensor, order: Tensor | None, factor: Tensor | None, signs: Tensor | None, low: Tensor, high: Tensor,
    groups: Tensor, left: Tensor, right: Tensor, gain: Tensor | None, factors: Sequence[int], inverse: bool,
    apart: bool, bits: int, group: int, scale: str, table: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], low.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[:10])
    ctx.factors, ctx.inverse, ctx.apart, *ctx.numbers = inputs[10:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, order, factor, signs, low, high, groups, left, right, gain = ctx.saved_tensors
    change = Change(order, factor, signs, tuple(ctx.factors), ctx.inverse, ctx.apart)
    wants_x, _, wants_factor, *_ = ctx.needs_input_grad
    wants_left, wants_right = ctx.needs_input_grad[7:9]
    inner = grad @ left.to(grad.dtype)
    seen = x if ctx.apart else change.apply(x)  # what R sees
    to_x = to_factor = None
    if wants_x or wants_factor:
        terms = (left[:, :0], right[:0]) if ctx.apart else (left, right)
        weight = qlr_weight(grad, low, high, groups, *terms, gain, *ctx.numbers)
        to_x, to_factor = change.adjoint(grad @ weight, x)
        to_x = to_x + inner @ right.to(x.dtype) if ctx.apart else to_x
    to_left = (grad.T @ linear(seen, right.to(x.dtype))).to(left.dtype) if wants_left else None
    to_right = (inner.T @ seen).to(right.dtype) if wants_right else None
    return to_x, None, to_factor, None, None, None, None, to_left, to_right, *([None] * 8)


qlr_changed.register_autograd(_backward, setup_context=_setup)
