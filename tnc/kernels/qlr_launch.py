"""Launches of the Q + L R kernels: shapes to tiles, workspaces, grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tnc.kernels.change import COUNTERS, Change, making
from tnc.kernels.launch import INTERPRETED, counters, early, multiprocessors, on_its_device, overlaps, tile_of
from tnc.kernels.lookup import lane_level, level_tensor
from tnc.kernels.qlr_tile_kernel import qlr_tile
from tnc.kernels.qlr_vector_kernel import qlr_vector
from tnc.kernels.rebuild_kernels import rebuild_qlr
from tnc.kernels.tuned import predicted, tuned
from tnc.kernels.words import unit_of

ONE = 134 << 23  # the bit pattern of 2.0 ** 7


@dataclass(frozen=True)
class Packed:
    """``dequant(Q) + L R`` as the kernels read it (`tnc.kernels.words`, `tnc.kernels.base.Base`).

    Attributes:
        low, high: code words; ``high`` is ``low`` unless codes have 3 bits.
        groups: group words (groups, out_features).
        left, right: (out_features, rank) and (rank, in_features); rank 0 is no low-rank term.
        bits: bits a code.
        group: columns of a group word.
        scale: what a group word holds: ``half``, ``brain``, ``single`` or ``pair``.
        table: levels of the codes by name or as numbers; empty for integers.
        gain: (1,) float32 that multiplies every scale, or ``None``.
    """

    low: Tensor
    high: Tensor
    groups: Tensor
    left: Tensor
    right: Tensor
    bits: int
    group: int
    scale: str
    table: str = ""
    gain: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out_features, in_features, rank)."""
        return self.low.shape[1], self.right.shape[1], self.left.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.low.device

    @property
    def alike(self) -> tuple[object, ...]:
        """What operators of one launch have in common."""
        _, columns, rank = self.shape
        dtypes = self.left.dtype, self.right.dtype
        return self.bits, self.group, self.scale, self.table, self.gain is None, columns, rank > 0, dtypes


@dataclass(frozen=True)
class _Members:
    """Operators of one launch: the tuples that the device code picks from, and their sizes together."""

    members: tuple[Packed, ...]
    block: int  # rows of a block

    @property
    def slots(self) -> int:
        """Number of t: one if the operators share a right factor, none without low-rank terms."""
        shared = len({packed.right.data_ptr() for packed in self.members}) == 1
        return 0 if self.rank == 0 else 1 if shared else len(self.members)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(packed.shape[2] for packed in self.members)

    @property
    def blocks(self) -> int:
        """Blocks of rows of all operators."""
        return sum(math.ceil(packed.shape[0] / self.block) for packed in self.members)

    def tensors(self, halves: bool) -> tuple[tuple[Tensor, ...], ...]:
        """lows, highs, groups, lefts, rights and gains; words as half words if ``halves``."""
        kind = torch.int16 if halves else torch.int32
        words = tuple(tuple(getattr(p, name).view(kind) for p in self.members) for name in ("low", "high"))
        rest = tuple(tuple(getattr(p, name) for p in self.members) for name in ("groups", "left", "right"))
        return *words, *rest, tuple(p.groups if p.gain is None else p.gain for p in self.members)

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """rows, ranks, first block and first row of every operator."""
        rows = tuple(p.shape[0] for p in self.members)
        firsts = accumulate((math.ceil(count / self.block) for count in rows[:-1]), initial=0)
        return (
            rows,
            tuple(max(p.shape[2], 1) for p in self.members),
            tuple(firsts),
            tuple(accumulate(rows[:-1], initial=0)),
        )


def _tile(members: Sequence[Packed], kernel: str, tokens: int) -> dict[str, int]:
    packed = members[0]
    rows, rank = sum(p.shape[0] for p in members), max(p.shape[2] for p in members)
    sizes = {"rows": rows, "columns": packed.shape[1], "rank": rank, "bits": packed.bits, "tokens": tokens}
    return tuned(kernel, packed.low.device, **sizes)


def _decoding(packed: Packed, kind: str) -> tuple[object, ...]:
    """What the device code has to know of the codes: group, whether a table, its lanes, whether a factor."""
    lanes = "" if INTERPRETED else lane_level(packed.table, kind)
    return packed.bits, packed.scale, packed.group, bool(packed.table), lanes, packed.gain is not None


def _counters(device: torch.device, makers: int, producers: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counters of the announcements of x and of t, where there are some, and others."""
    first, second = COUNTERS * (makers > 0), COUNTERS * (producers > 0)
    taken = counters(device).take(first + second + others)
    return taken, taken[first:], taken[first + second :]


def faster(packed: Packed, tokens: int) -> bool:
    """Whether `vector` is expected to be at least as fast as `tile`, as far as they were timed."""
    rows, columns, rank = packed.shape
    sizes = {"rows": rows, "columns": columns, "rank": rank, "bits": packed.bits, "tokens": tokens}
    device = packed.low.device
    own, other = (predicted(kernel, device, **sizes) for kernel in ("qlr_vector", "qlr_tile"))
    return own is None or other is None or own <= other


def stride_of(blocks: int, splits: int, producers: int, programs: int) -> int:
    """Programs of a split: as many as run at once beside the producers, each with as many blocks as any other."""
    together = max((programs - producers) // splits, 1)
    return math.ceil(blocks / math.ceil(blocks / together))


@on_its_device
def vector(x: Tensor, *members: Packed, change: Change | None = None) -> Tensor:
    """One or two tokens (M, in_features) to (M, out_features) of each operator, one after another in (M, rows).

    ``change`` is what happens to x first.
    """
    packed, tokens = members[0], x.shape[0]
    columns = packed.shape[1]
    config = _tile(members, "qlr_vector", tokens)
    group = _Members(members, config["rows"])
    units = math.ceil(columns / unit_of(packed.bits))
    each = 2 * config["words"]  # units of a warp
    warps = min(config["warps"], tile_of(math.ceil(units / each), least=1))
    chunk = each * warps
    splits, rank, blocks = math.ceil(units / chunk), group.rank, group.blocks
    wide = tile_of(rank, most=128)  # columns of L at a time
    padded = math.ceil(rank / wide) * wide if rank else 16
    producers = group.slots * (padded // config["ranks"])
    how = making(x, change, columns, read=True)
    stride = stride_of(blocks, splits, producers + how.makers, config["programs"] * multiprocessors(x.device))
    across = min(4096, 1024 * warps, tile_of(columns))  # of R at a time
    rows, ranks, firsts, tops = group.sizes()
    y = x.new_empty(tokens, sum(rows))
    t = torch.empty(max(group.slots, 1) * tokens * padded, dtype=torch.float32, device=x.device)
    slab = torch.empty(splits * tokens * sum(rows) if splits > 1 else 1, dtype=torch.float32, device=x.device)
    ready, told, arrived = _counters(x.device, how.makers, producers, blocks)
    pdl = overlaps(x.device)
    qlr_vector[(how.makers + producers + stride * splits,)](
        x, how.made, how.tensors, ready, *group.tensors(halves=False), level_tensor(packed.table, x.device), t, slab,
        told, arrived, y, rows, ranks, firsts, tops, sum(rows), blocks, ONE, how.unit, tokens,
        columns, x.shape[1], how.form, how.makers, change is not None and change.apart, *_decoding(packed, "f32"),
        padded, config["ranks"], across, producers, config["rows"], chunk, config["words"], splits, stride,
        stride < blocks, INTERPRETED, pdl, num_warps=warps, **registers(config["programs"], warps),
        **early(pdl),
    )  # fmt: skip
    return y


@on_its_device
def tile(x: Tensor, *members: Packed, change: Change | None = None) -> Tensor:
    """Up to 64 tokens (M, in_features) to (M, out_features) of each operator, one after another in (M, rows).

    ``change`` is what happens to x first.
    """
    packed, tokens = members[0], x.shape[0]
    columns = packed.shape[1]
    config = _tile(members, "qlr_tile", tokens)
    group = _Members(members, config["rows"])
    units, block = math.ceil(columns / unit_of(packed.bits)), tile_of(tokens)
    splits = min(config["splits"], units)
    steps = math.ceil(units / splits)
    splits, rank, blocks = math.ceil(units / steps), group.rank, group.blocks
    ranks = tile_of(rank, most=64)
    padded = math.ceil(rank / ranks) * ranks if rank else ranks
    chunks = min(config["chunks"], math.ceil(columns / 64))
    producers, slots = group.slots * (padded // ranks * chunks), max(group.slots, 1)
    how = making(x, change, columns, read=False)
    rows, sizes, firsts, tops = group.sizes()
    y = x.new_empty(tokens, sum(rows))
    t = x.new_empty(slots, block, padded)
    parts = torch.empty(slots * chunks * block * padded, dtype=torch.float32, device=x.device)
    slab = torch.empty(splits * tokens * sum(rows) if splits > 1 else 1, dtype=torch.float32, device=x.device)
    ready, told, arrived = _counters(x.device, how.makers, producers, producers + blocks)
    pdl = overlaps(x.device)
    qlr_tile[(how.makers + producers + blocks * splits,)](
        x, how.made, how.tensors, ready, *group.tensors(halves=True), level_tensor(packed.table, x.device), t, parts,
        slab, told, arrived, y, tokens, rows, sizes, firsts, tops, sum(rows), blocks,
        how.unit, block, columns, x.shape[1], how.form, how.makers, change is not None and change.apart,
        *_decoding(packed, "f16" if x.dtype == torch.float16 else "bf16"), padded, ranks, chunks, producers,
        config["rows"], steps, splits, config["stages"], _exact(x), not INTERPRETED, pdl,
        num_warps=config["warps"], **early(pdl),
    )  # fmt: skip
    return y


@on_its_device
def rebuild(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (out_features, in_features) in ``dtype``, added in float32 and rounded once."""
    rows, columns, rank = packed.shape
    config = _tile((packed,), "rebuild_qlr", 0)
    weight = torch.empty(rows, columns, dtype=dtype, device=packed.low.device)
    ranks = tile_of(rank, most=64)
    padded = math.ceil(rank / ranks) * ranks if rank else 0
    stages = config["stages"] if padded <= ranks else 1  # two blocks of ranks in flight are 328 KB of shared memory
    pdl = overlaps(weight.device)
    grid = (math.ceil(rows / config["rows"]), math.ceil(columns / unit_of(packed.bits) / config["units"]))
    rebuild_qlr[grid](
        packed.low.view(torch.int16), packed.high.view(torch.int16), packed.groups, packed.left.to(dtype),
        packed.right.to(dtype), packed.groups if packed.gain is None else packed.gain,
        level_tensor(packed.table, weight.device), weight,
        rows, max(rank, 1), columns, *_decoding(packed, "f32"), padded, ranks, config["rows"], config["units"],
        stages, _exact(weight), not _exact(weight), pdl, num_warps=config["warps"], **early(pdl),
    )  # fmt: skip
    return weight


def _exact(tensor: Tensor) -> bool:
    return INTERPRETED or tensor.dtype == torch.float32


def registers(programs: int, warps: int) -> dict[str, int]:
    """The bound on a thread's registers that lets so many programs run at once on a multiprocessor."""
    return {} if INTERPRETED else {"maxnreg": min(255, 65536 // (programs * warps * 32) // 8 * 8)}
