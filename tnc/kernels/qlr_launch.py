"""Launches of the Q + L R kernels: shapes to tiles, workspaces, grids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.kernels.launch import INTERPRETED, counters, multiprocessors, overlaps, tile_of
from tnc.kernels.qlr_tile_kernel import qlr_tile
from tnc.kernels.qlr_vector_kernel import qlr_vector
from tnc.kernels.rebuild_kernels import rebuild_qlr
from tnc.kernels.tuned import predicted, tuned
from tnc.kernels.words import unit_of

_ONE = 134 << 23  # the bit pattern of 2.0 ** 7


@dataclass(frozen=True)
class Packed:
    """``dequant(Q) + L R`` as the kernels read it (`tnc.kernels.words`).

    Attributes:
        low, high: code words; ``high`` is ``low`` unless codes have 3 bits.
        groups: group words (groups, out_features).
        left, right: (out_features, rank) and (rank, in_features); rank 0 is no low-rank term.
        bits: bits a code.
        group: columns in a group.
        half: scales are float16, else bfloat16.
    """

    low: Tensor
    high: Tensor
    groups: Tensor
    left: Tensor
    right: Tensor
    bits: int
    group: int
    half: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out_features, in_features, rank)."""
        return self.low.shape[1], self.right.shape[1], self.left.shape[1]


def _shape_key(packed: Packed, kernel: str, tokens: int) -> dict[str, int]:
    rows, columns, rank = packed.shape
    return tuned(kernel, packed.low.device, rows=rows, columns=columns, rank=rank, bits=packed.bits, tokens=tokens)


def faster(packed: Packed, tokens: int) -> bool:
    """Whether `vector` is expected to be at least as fast as `tile`."""
    rows, columns, rank = packed.shape
    sizes = {"rows": rows, "columns": columns, "rank": rank, "bits": packed.bits, "tokens": tokens}
    device = packed.low.device
    return predicted("qlr_vector", device, **sizes) <= predicted("qlr_tile", device, **sizes)


def vector(x: Tensor, packed: Packed) -> Tensor:
    """One or two tokens (M, in_features) to (M, out_features)."""
    rows, columns, rank = packed.shape
    config = _shape_key(packed, "qlr_vector", x.shape[0])
    units = math.ceil(columns / unit_of(packed.bits))
    warps = min(config["warps"], tile_of(math.ceil(units / 8), least=1))
    chunk = 8 * warps
    splits, blocks = math.ceil(units / chunk), math.ceil(rows / config["rows"])
    stride = min(blocks, config["programs"] * multiprocessors(x.device))
    across = tile_of(rank, most=128)  # columns of L at a time
    padded = math.ceil(rank / across) * across if rank else 16
    producers = math.ceil(padded / config["ranks"]) if rank else 0
    y = x.new_empty(x.shape[0], rows)
    work = torch.empty(x.shape[0] * (padded + splits * rows), dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    qlr_vector[(producers + stride * splits,)](
        x, packed.low, packed.high, packed.groups, packed.left, packed.right, work, work[x.shape[0] * padded :],
        counters(x.device).take(2 + blocks), y, rows, max(rank, 1), _ONE, x.shape[0], columns, packed.bits,
        packed.half, packed.group, padded, config["ranks"], min(4096, 1024 * warps,
        tile_of(columns)), producers, config["rows"],
        chunk, splits, stride, stride < blocks, pdl, num_warps=warps, **_options(pdl),
    )  # fmt: skip
    return y


def tile(x: Tensor, packed: Packed) -> Tensor:
    """Up to 64 tokens (M, in_features) to (M, out_features)."""
    rows, columns, rank = packed.shape
    tokens = x.shape[0]
    config = _shape_key(packed, "qlr_tile", tokens)
    units, block = math.ceil(columns / unit_of(packed.bits)), tile_of(tokens)
    splits = min(config["splits"], units)
    steps = math.ceil(units / splits)
    splits = math.ceil(units / steps)
    ranks = tile_of(rank, most=64)
    padded = math.ceil(rank / ranks) * ranks if rank else ranks
    chunks = min(config["chunks"], math.ceil(columns / 64))
    producers = padded // ranks * chunks if rank else 0
    blocks = math.ceil(rows / config["rows"])
    y = x.new_empty(tokens, rows)
    t = x.new_empty(block, padded)
    parts = torch.empty(chunks * block * padded, dtype=torch.float32, device=x.device)
    slab = torch.empty(splits * tokens * rows if splits > 1 else 1, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    qlr_tile[(producers + blocks * splits,)](
        x, packed.low.view(torch.int16), packed.high.view(torch.int16), packed.groups, packed.left, packed.right, t,
        parts, slab, counters(x.device).take(2 + producers + blocks), y, tokens, rows, max(rank, 1), block, columns,
        packed.bits, packed.half, packed.group, padded, ranks, chunks, producers, config["rows"], steps, splits,
        config["stages"], _exact(x), not INTERPRETED, pdl, num_warps=config["warps"], **_options(pdl),
    )  # fmt: skip
    return y


def rebuild(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (out_features, in_features) in ``dtype``, added in float32 and rounded once."""
    rows, columns, rank = packed.shape
    config = _shape_key(packed, "rebuild_qlr", 0)
    weight = torch.empty(rows, columns, dtype=dtype, device=packed.low.device)
    ranks = tile_of(rank, most=64)
    padded = math.ceil(rank / ranks) * ranks if rank else 0
    stages = config["stages"] if padded <= ranks else 1  # two blocks of ranks in flight are 328 KB of shared memory
    pdl = overlaps(weight.device)
    grid = (math.ceil(rows / config["rows"]), math.ceil(columns / unit_of(packed.bits) / config["units"]))
    rebuild_qlr[grid](
        packed.low.view(torch.int16), packed.high.view(torch.int16), packed.groups, packed.left.to(dtype),
        packed.right.to(dtype), weight,
        rows, max(rank, 1), columns, packed.bits, packed.half, packed.group, padded, ranks, config["rows"],
        config["units"], stages, _exact(weight), not _exact(weight), pdl,
        num_warps=config["warps"], **_options(pdl),
    )  # fmt: skip
    return weight


def _exact(tensor: Tensor) -> bool:
    return INTERPRETED or tensor.dtype == torch.float32


def _options(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}
