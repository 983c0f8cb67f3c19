"""Launches of the grouped experts' kernels: stacked weights, tiles, workspaces, grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tnc.kernels.experts_kernels import experts_tile, route, weighted_sum
from tnc.kernels.experts_vector_kernel import experts_vector
from tnc.kernels.launch import INTERPRETED, counters, early, multiprocessors, on_its_device, overlaps, tile_of
from tnc.kernels.lookup import lane_level, level_tensor
from tnc.kernels.qlr_launch import ONE, Packed, registers, stride_of
from tnc.kernels.tuned import tuned
from tnc.kernels.words import unit_of

_RANKED = 8192  # pairs ordered by comparing each with each; more are sorted


@dataclass(frozen=True)
class Stacked:
    """``dequant(Q_e) + L_e R_e`` of every expert e, as the kernels read them (`tnc.kernels.qlr_launch.Packed`).

    Attributes:
        low, high: code words (experts, units, out_features, 16 or 8).
        groups: group words (experts, groups, out_features).
        left, right: the factors of all experts, one after another, flat: expert e begins at ``out_features firsts[e]``
            and ``in_features firsts[e]``.
        firsts: (experts + 1,) int32, the sums of the ranks before each.
        gain: (experts,) float32 or ``None``.
        ranks: of each expert; 0 is no low-rank term.
        columns: in_features.
        bits, group, scale, table: as in `Packed`, the same for all.
    """

    low: Tensor
    high: Tensor
    groups: Tensor
    left: Tensor
    right: Tensor
    firsts: Tensor
    gain: Tensor | None
    ranks: tuple[int, ...]
    columns: int
    bits: int
    group: int
    scale: str
    table: str = ""

    @classmethod
    def of(cls, members: Sequence[Packed]) -> Stacked:
        """A copy of the experts' weights side by side; they differ in nothing but rank."""
        first, ranks = members[0], [packed.shape[2] for packed in members]
        planes = [torch.stack([getattr(packed, name) for packed in members]) for name in ("low", "groups")]
        high = planes[0] if first.bits != 3 else torch.stack([packed.high for packed in members])
        left = torch.cat([packed.left.flatten() for packed in members])
        right = torch.cat([packed.right.flatten() for packed in members])
        gain = None if first.gain is None else torch.cat([p.gain for p in members if p.gain is not None])
        firsts = torch.tensor([0, *accumulate(ranks)], dtype=torch.int32, device=first.low.device)
        return cls(planes[0], high, planes[1], left, right, firsts, gain, tuple(ranks), first.shape[1], first.bits,
                   first.group, first.scale, first.table)  # fmt: skip

    def member(self, expert: int) -> Packed:
        """The weight of one expert; its tensors are views."""
        first, rank = sum(self.ranks[:expert]), self.ranks[expert]
        rows, columns = self.low.shape[2], self.columns
        left = self.left[rows * first : rows * (first + rank)].view(rows, rank)
        right = self.right[columns * first : columns * (first + rank)].view(rank, columns)
        gain = None if self.gain is None else self.gain[expert : expert + 1]
        return Packed(self.low[expert], self.high[expert], self.groups[expert], left, right, self.bits, self.group,
                      self.scale, self.table, gain)  # fmt: skip


def worst_tiles(pairs: int, experts: int, block: int) -> int:
    """Tiles of the worst routing: as many experts as may be, each with a tile that is not full."""
    chosen = min(pairs, experts + 1)  # pairs without expert have tiles too
    return chosen + (pairs - chosen) // block


@on_its_device
def order_pairs(index: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """``order`` (pairs,) and ``tiles`` (3, tiles) of `tnc.kernels.experts.route`; pairs > 0."""
    pairs = index.numel()
    count = worst_tiles(pairs, experts, block)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    tiles = torch.empty(3, count, dtype=torch.int32, device=index.device)
    ranked = pairs <= _RANKED and (experts + 2) * pairs < 2**31
    if not ranked:
        named = torch.where((index < 0) | (index > experts), experts, index)
        order = torch.argsort(named, stable=True).to(torch.int32)
    pdl = overlaps(index.device)
    together = 16
    route[(1 + (math.ceil(pairs / together) if ranked else 0),)](
        index, order, tiles, pairs, experts, count, block, ranked, together, tile_of(pairs, most=1024),
        tile_of(experts + 2, least=32), pdl, num_warps=8, **early(pdl),
    )  # fmt: skip
    return order, tiles


def grouped(x: Tensor, order: Tensor, tiles: Tensor, stacked: Stacked, block: int) -> Tensor:
    """(pairs, out_features) for x (pairs / n, in_features) in 16 bits; ``order`` and ``tiles`` for this ``block``."""
    pairs, experts, rows = order.numel(), len(stacked.ranks), stacked.low.shape[2]
    active = min(pairs, experts)  # experts that a routing is likely to choose, if it spreads
    sizes = {"rows": rows * active, "columns": stacked.columns, "rank": max(stacked.ranks), "bits": stacked.bits}
    config = tuned("experts_tile", x.device, **sizes, tokens=math.ceil(pairs / active))
    return launched(x, order, tiles, stacked, block, config)


@on_its_device
def launched(x: Tensor, order: Tensor, tiles: Tensor, stacked: Stacked, block: int, config: dict[str, int]) -> Tensor:
    """`grouped` with a tile: rows, splits of columns, chunks of t's columns, stages, warps, programs.

    ``programs`` is how many shall fit a multiprocessor, which bounds their registers; 0 is no bound.
    """
    pairs, rows, columns = order.numel(), stacked.low.shape[2], stacked.columns
    count, experts, share = tiles.shape[1], len(stacked.ranks), pairs // x.shape[0]
    units, blocks = math.ceil(columns / unit_of(stacked.bits)), math.ceil(rows / config["rows"])
    steps = math.ceil(units / min(config["splits"], units))
    splits, rank = math.ceil(units / steps), max(stacked.ranks)
    ranks = tile_of(rank, most=64)
    padded = math.ceil(rank / ranks) * ranks
    chunks = min(config["chunks"], math.ceil(columns / 64))
    producers, flags = count * (padded // ranks) * chunks, count * (2 + padded // ranks)
    y = x.new_empty(pairs, rows)
    t = x.new_empty(count, block, padded)
    parts = torch.empty(count * chunks * block * padded, dtype=torch.float32, device=x.device)
    slab = torch.empty(splits * pairs * rows if splits > 1 else 1, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    experts_tile[(producers + count * blocks * splits,)](
        x, *_weights(stacked, torch.int16), level_tensor(stacked.table, x.device), order, tiles, t, parts, slab,
        counters(x.device).take(flags + (count * blocks if splits > 1 else 0)), y, pairs, rows, experts, count, share,
        block, columns, *_decoding(stacked, "f16" if x.dtype == torch.float16 else "bf16"), padded, ranks, chunks,
        config["rows"], steps, splits, config["stages"], INTERPRETED, not INTERPRETED, pdl, num_warps=config["warps"],
        **(registers(config["programs"], config["warps"]) if config["programs"] else {}), **early(pdl),
    )  # fmt: skip
    return y


def apart(x: Tensor, index: Tensor, stacked: Stacked) -> Tensor:
    """(pairs, out_features) for x (pairs / n, in_features), float32 or in 16 bits, each pair by itself."""
    pairs, rows = index.numel(), stacked.low.shape[2]
    sizes = {"rows": rows * pairs, "columns": stacked.columns, "rank": max(stacked.ranks), "bits": stacked.bits}
    return launched_apart(x, index, stacked, tuned("experts_vector", x.device, **sizes, tokens=1))


@on_its_device
def launched_apart(x: Tensor, index: Tensor, stacked: Stacked, config: dict[str, int]) -> Tensor:
    """`apart` with a tile: rows of a block, warps, ranks a producer makes, programs a multiprocessor."""
    pairs, rows, columns, rank = index.numel(), stacked.low.shape[2], stacked.columns, max(stacked.ranks)
    units, blocks = math.ceil(columns / unit_of(stacked.bits)), math.ceil(rows / config["rows"])
    warps = min(config["warps"], tile_of(math.ceil(units / 8), least=1))
    splits = math.ceil(units / (8 * warps))
    across = tile_of(rank, most=128)  # columns of L at a time
    padded = math.ceil(rank / across) * across
    producers = pairs * (padded // config["ranks"])
    stride = stride_of(blocks, splits * pairs, producers, config["programs"] * multiprocessors(x.device))
    y = x.new_empty(pairs, rows)
    t = torch.empty(pairs * padded, dtype=torch.float32, device=x.device)
    slab = torch.empty(splits * pairs * rows if splits > 1 else 1, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    experts_vector[(producers + pairs * stride * splits,)](
        x, *_weights(stacked, torch.int32), level_tensor(stacked.table, x.device), index, t, slab,
        counters(x.device).take(2 * pairs + (pairs * blocks if splits > 1 else 0)), y, pairs, rows, len(stacked.ranks),
        pairs // x.shape[0], blocks, ONE, columns, *_decoding(stacked, "f32"), padded, config["ranks"],
        min(4096, 1024 * warps, tile_of(columns)), config["rows"], 8 * warps, splits, stride, stride < blocks, pdl,
        num_warps=warps, **registers(config["programs"], warps), **early(pdl),
    )  # fmt: skip
    return y


def _weights(stacked: Stacked, kind: torch.dtype) -> tuple[Tensor, ...]:
    """The weights as a kernel takes them, code words as ``kind``."""
    gain = stacked.groups if stacked.gain is None else stacked.gain
    return (stacked.low.view(kind), stacked.high.view(kind), stacked.groups, stacked.left, stacked.right,
            stacked.firsts, gain)  # fmt: skip


def _decoding(stacked: Stacked, kind: str) -> tuple[object, ...]:
    """What the device code has to know of the codes."""
    lanes = "" if INTERPRETED else lane_level(stacked.table, kind)
    return stacked.bits, stacked.scale, stacked.group, bool(stacked.table), lanes, stacked.gain is not None


@on_its_device
def summed(y: Tensor, weights: Tensor, index: Tensor, experts: int) -> Tensor:
    """(tokens, n): weights (tokens, k) times the rows of ``y`` (tokens k, n), added in float32."""
    tokens, share = weights.shape
    columns = y.shape[1]
    result = y.new_empty(tokens, columns)
    block = tile_of(columns, most=512)
    pdl = overlaps(y.device)
    weighted_sum[(tokens, math.ceil(columns / block))](
        y, weights, index, result, columns, experts, share, block, pdl, num_warps=4, **early(pdl)
    )
    return result
