"""``tnc::route``, ``tnc::experts`` and ``tnc::weighted_sum``: linear layers of a mixture's experts, all in one launch.

A token and a place of its router's choice are a *pair*, numbered ``token * k + place``. `route` orders pairs by expert
and cuts them into tiles of one expert each, on the device: shapes do not depend on what was routed, nothing waits for
the host, graphs replay. `experts` gives every pair the answer of its expert. Without a GPU a loop over the experts
that have pairs does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tnc.kernels.experts_launch import Stacked, apart, grouped, order_pairs, summed, worst_tiles
from tnc.kernels.launch import INTERPRETED
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import dense

SMALL, LARGE = 16, 32  # pairs a tile holds
_SMALL_TO = 8  # pairs an expert up to which tiles are small
APART_PAIRS = 16  # pairs up to which each may run by itself


def run_apart(pairs: int, experts: int) -> bool:
    """Whether each pair runs by itself: few pairs, and so few that they hardly share experts."""
    return pairs <= APART_PAIRS and 2 * pairs <= experts


def tile_pairs(pairs: int, experts: int) -> int:
    """Pairs that a tile holds: by the mean over experts, since what they really get stays on the device."""
    return SMALL if pairs <= _SMALL_TO * experts else LARGE


@torch.library.custom_op("tnc::route", mutates_args=())
def route(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, and tiles.

    Args:
        index: (pairs,) expert of each; what is not in ``range(experts)`` names none.
        experts: number of experts.

    Returns:
        int32 ``order`` (pairs,), stable, pairs of no expert last; int32 ``tiles`` (3, tiles): expert (``experts`` for
        none, -1 for a tile that is not there, whose other numbers mean nothing), first position in ``order`` and the
        one after the last. A tile holds `tile_pairs`, and there are as many as the worst routing needs. Both are empty
        where pairs run by themselves (`run_apart`).
    """
    if run_apart(index.numel(), experts):
        return index.new_empty(0, dtype=torch.int32), index.new_empty(3, 0, dtype=torch.int32)
    block = tile_pairs(index.numel(), experts)
    if index.numel() == 0 or not _launched(index):
        return _routed(index, experts, block)
    return order_pairs(index.contiguous(), experts, block)


@route.register_fake
def _(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    pairs = index.numel()
    if run_apart(pairs, experts):
        return index.new_empty(0, dtype=torch.int32), index.new_empty(3, 0, dtype=torch.int32)
    tiles = worst_tiles(pairs, experts, tile_pairs(pairs, experts))
    return index.new_empty(pairs, dtype=torch.int32), index.new_empty(3, tiles, dtype=torch.int32)


def _routed(index: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """`route` by torch."""
    named = torch.where((index < 0) | (index > experts), experts, index)
    order = torch.argsort(named, stable=True).to(torch.int32)
    counts = torch.bincount(named, minlength=experts + 1).tolist()
    tiles = []
    for expert, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0))):
        tiles += [(expert, first, min(first + block, stop)) for first in range(start, stop, block)]
    held = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3).T
    return order, pad(held, (0, worst_tiles(len(index), experts, block) - len(tiles)), value=-1).to(index.device)


@torch.library.custom_op("tnc::experts", mutates_args=())
def experts(
    x: Tensor, index: Tensor, order: Tensor, tiles: Tensor, low: Tensor, high: Tensor, groups: Tensor, left: Tensor,
    right: Tensor, firsts: Tensor, gain: Tensor | None, ranks: Sequence[int], bits: int, group: int, scale: str,
    table: str,
) -> Tensor:  # fmt: skip
    """(pairs, out_features): for each pair ``W_e x`` of its expert e, and zero where it has none.

    ``x`` is (pairs / n, in_features), and pair p takes row ``p // n``; ``order`` and ``tiles`` are what `route` made of
    ``index`` (pairs,); the other arguments are the weights (`tnc.kernels.experts_launch.Stacked`).
    """
    stacked = Stacked(low, high, groups, left, right, firsts, gain, tuple(ranks), x.shape[1], bits, group, scale, table)
    if not _launched(x) or x.dtype not in (torch.float16, torch.bfloat16) or index.numel() == 0:
        return _looped(x, index, stacked)
    if run_apart(index.numel(), len(ranks)):
        return apart(x.contiguous(), index.contiguous(), stacked)
    return grouped(x.contiguous(), order, tiles, stacked, tile_pairs(index.numel(), len(ranks)))


@experts.register_fake
def _(
    x: Tensor, index: Tensor, order: Tensor, tiles: Tensor, low: Tensor, high: Tensor, groups: Tensor, left: Tensor,
    right: Tensor, firsts: Tensor, gain: Tensor | None, ranks: Sequence[int], bits: int, group: int, scale: str,
    table: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(index.numel(), low.shape[2])


@dataclass(frozen=True)
class _Share:
    """The pairs of one expert, their rows of x, and where its factors lie in the flat ones."""

    pairs: Tensor
    rows: Tensor
    weight: Packed
    left: slice
    right: slice


def _shares(x: Tensor, index: Tensor, stacked: Stacked) -> list[_Share]:
    """One for every expert that has pairs."""
    found = []
    rows, columns = stacked.low.shape[2], stacked.columns
    firsts = list(accumulate(stacked.ranks, initial=0))
    many = index.numel() // max(x.shape[0], 1)
    for expert, (first, last) in enumerate(pairwise(firsts)):
        pairs = (index == expert).nonzero().squeeze(1)
        if len(pairs):
            sides = slice(rows * first, rows * last), slice(columns * first, columns * last)
            found.append(_Share(pairs, pairs // many, stacked.member(expert), *sides))
    return found


def _looped(x: Tensor, index: Tensor, stacked: Stacked) -> Tensor:
    """`experts` by torch: the weight of each expert that has pairs, rounded once, and one multiplication."""
    y = x.new_zeros(index.numel(), stacked.low.shape[2])
    for share in _shares(x, index, stacked):
        y[share.pairs] = linear(x[share.rows], dense(share.weight, x.dtype).to(x.dtype))
    return y


def _launched(tensor: Tensor) -> bool:
    return INTERPRETED or tensor.is_cuda


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    x, index, _, _, low, high, groups, left, right, firsts, gain, *ctx.numbers = inputs
    ctx.save_for_backward(x, index, low, high, groups, left, right, firsts)
    ctx.gain = gain


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """To x, L and R, one expert after another."""
    x, index, low, high, groups, left, right, firsts = ctx.saved_tensors
    ranks, bits, group, scale, table = ctx.numbers
    stacked = Stacked(low, high, groups, left, right, firsts, ctx.gain, tuple(ranks), x.shape[1], bits, group,
                      scale, table)  # fmt: skip
    to_x, to_left, to_right = torch.zeros_like(x), torch.zeros_like(left), torch.zeros_like(right)
    for share in _shares(x, index, stacked):
        part, rows = grad[share.pairs], x[share.rows]
        to_x.index_add_(0, share.rows, part @ dense(share.weight, x.dtype).to(x.dtype))
        outer, inner = share.weight.left.to(x.dtype), share.weight.right.to(x.dtype)
        to_left[share.left] = (part.T @ linear(rows, inner)).flatten().to(left.dtype)
        to_right[share.right] = ((part @ outer).T @ rows).flatten().to(right.dtype)
    return to_x, None, None, None, None, None, None, to_left, to_right, *[None] * 7


experts.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("tnc::weighted_sum", mutates_args=())
def weighted_sum(y: Tensor, weights: Tensor, index: Tensor, experts: int) -> Tensor:
    """(tokens, n): for each token the sum over its pairs of weight times row of ``y``, in float32, rounded once.

    Args:
        y: (tokens k, n), one row a pair.
        weights: (tokens, k).
        index: (tokens, k) experts; pairs that name none count for nothing.
        experts: number of experts.
    """
    if not _launched(y) or y.dtype == torch.float64 or y.numel() == 0 or weights.numel() == 0:
        named = (index >= 0) & (index < experts)
        shares = torch.where(named, weights, 0).to(torch.promote_types(y.dtype, torch.float32)).unsqueeze(-1)
        parts = torch.where(named.unsqueeze(-1), torch.unflatten(y, 0, index.shape).to(shares.dtype), 0)
        return (parts * shares).sum(1).to(y.dtype)
    return summed(y.contiguous(), weights.contiguous(), index.contiguous(), experts)


@weighted_sum.register_fake
def _(y: Tensor, weights: Tensor, index: Tensor, experts: int) -> Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    y, weights, index, ctx.experts = inputs
    ctx.save_for_backward(y, weights, index)


def _backward_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    y, weights, index = ctx.saved_tensors
    named = ((index >= 0) & (index < ctx.experts)).unsqueeze(-1)
    to_y = torch.where(named, grad.unsqueeze(1) * weights.to(grad.dtype).unsqueeze(-1), 0)
    to_weights = torch.where(named, grad.unsqueeze(1) * torch.unflatten(y, 0, index.shape), 0).sum(-1)
    return to_y.flatten(0, 1), to_weights.to(weights.dtype), None, None


weighted_sum.register_autograd(_backward_sum, setup_context=_setup_sum)
