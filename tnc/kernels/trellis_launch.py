"""Launches of the kernels of trellis-coded weights: shapes to tiles, workspaces, grids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.kernels.launch import INTERPRETED, counters, early, on_its_device, overlaps, tile_of
from tnc.kernels.trellis_fixes import EACH
from tnc.kernels.trellis_kernels import trellis_vector
from tnc.kernels.trellis_tile_kernel import fix_trellis, rebuild_trellis, trellis_tile
from tnc.kernels.tuned import tuned


@dataclass(frozen=True)
class Coded:
    """``W + L R``, W coded on a trellis of anti-diagonals, as the kernels read it (`tnc.kernels.trellis_fixes`).

    Attributes:
        stream, firsts, items, fixes: of the codes.
        steps: (out_features,) float32, what a unit of the level is.
        left, right: (out_features, rank) and (rank, in_features); rank 0 is no low-rank term.
        bits, state_bits, length: of the format.
    """

    stream: Tensor
    firsts: Tensor
    items: Tensor
    fixes: Tensor
    steps: Tensor
    left: Tensor
    right: Tensor
    bits: int
    state_bits: int
    length: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out_features, in_features, rank)."""
        return self.steps.shape[0], self.right.shape[1], self.left.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.stream.device

    @property
    def units(self) -> int:
        """Units of rows."""
        return self.firsts.shape[1] - 1

    @property
    def unit(self) -> int:
        """Rows of a unit."""
        return 32 if self.bits == 3 else 16

    @property
    def lines(self) -> int:
        """Lines of a unit."""
        return -(-(self.shape[1] + self.unit - 1) // 16) * 16

    def sizes(self, tokens: int) -> dict[str, int]:
        """As `tnc.kernels.tuned` takes them."""
        rows, columns, rank = self.shape
        return {"rows": rows, "columns": columns, "rank": rank, "bits": self.bits, "tokens": tokens}

    @property
    def fixed(self) -> tuple[Tensor, Tensor, Tensor]:
        """``firsts``, ``items`` and ``fixes``; an address for each where there are none."""
        items, fixes = (t if t.shape[0] else t.new_zeros(1) for t in (self.items, self.fixes))
        return self.firsts, items, fixes


@on_its_device
def vector(x: Tensor, coded: Coded) -> Tensor:
    """One or two tokens (M, in_features) to (M, out_features)."""
    (rows, columns, rank), tokens, items = coded.shape, x.shape[0], coded.items.shape[0]
    config = tuned("trellis_vector", x.device, **coded.sizes(tokens))
    chunks = math.ceil(math.ceil(coded.lines / 128) / config["splits"])
    splits = math.ceil(math.ceil(coded.lines / 128) / chunks)
    across = tile_of(rank, most=64)  # columns of L at a time
    padded = math.ceil(rank / across) * across if rank else 16
    producers = padded // config["ranks"] if rank else 0
    y = x.new_empty(tokens, rows)
    t = torch.empty(tokens * padded, dtype=torch.float32, device=x.device)
    programs = items + coded.units * splits
    slab = torch.empty(programs * tokens * coded.unit, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    trellis_vector[(producers + programs,)](
        x, coded.stream, *coded.fixed, coded.steps, coded.left, coded.right, t, slab,
        counters(x.device).take(2 + coded.units), y, rows, max(rank, 1), items, tokens, columns, coded.lines,
        coded.bits, coded.state_bits, padded, config["ranks"], min(1024, tile_of(columns)), producers, splits, chunks,
        EACH, coded.units, not INTERPRETED, pdl, num_warps=1, **early(pdl),
    )  # fmt: skip
    return y


@on_its_device
def tile(x: Tensor, coded: Coded) -> Tensor:
    """Up to 32 tokens (M, in_features) to (M, out_features)."""
    (rows, columns, rank), tokens, items = coded.shape, x.shape[0], coded.items.shape[0]
    config = tuned("trellis_tile", x.device, **coded.sizes(tokens))
    block = tile_of(tokens)
    steps = math.ceil(math.ceil(columns / config["across"]) / config["splits"])
    splits = math.ceil(math.ceil(columns / config["across"]) / steps)
    ranks = tile_of(rank, most=64)
    padded = math.ceil(rank / ranks) * ranks if rank else ranks
    chunks = min(config["chunks"], math.ceil(columns / 64))
    producers = padded // ranks * chunks if rank else 0
    turns = math.ceil(columns / 256) if items else 0
    blocks = math.ceil(coded.units / config["units"])
    y, turned = x.new_empty(tokens, rows), x.new_empty(columns, block)
    t = x.new_empty(block, padded)
    parts = torch.empty(chunks * block * padded, dtype=torch.float32, device=x.device)
    slots = items + blocks * splits * config["units"]
    slab = torch.empty(slots * block * coded.unit, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    trellis_tile[(turns + producers + items + blocks * splits,)](
        x, turned, coded.stream, *coded.fixed, coded.steps, coded.left, coded.right, t, parts, slab,
        counters(x.device).take(4 + producers + blocks), y, tokens, rows, max(rank, 1), items, turns, block, columns,
        coded.lines, coded.bits, coded.state_bits, padded, ranks, chunks, producers, config["across"], splits, steps,
        config["units"], min(config["some"], EACH), config["several"], EACH, coded.units, INTERPRETED, not INTERPRETED,
        pdl, num_warps=config["warps"], **early(pdl),
    )  # fmt: skip
    return y


@on_its_device
def rebuild(coded: Coded, dtype: torch.dtype) -> Tensor:
    """W alone (out_features, in_features) in ``dtype``, rounded once."""
    rows, columns, _ = coded.shape
    config = tuned("rebuild_trellis", coded.device, **coded.sizes(0))
    weight = torch.empty(rows, columns, dtype=dtype, device=coded.device)
    pdl, across = overlaps(weight.device), config["across"]
    rest = (rows, columns, coded.lines, coded.bits, coded.state_bits)
    rebuild_trellis[(coded.units, math.ceil(columns / across))](
        coded.stream, coded.steps, weight, *rest, across, not INTERPRETED, pdl, num_warps=config["warps"],
        **early(pdl),
    )  # fmt: skip
    if coded.items.shape[0]:
        fix_trellis[(coded.items.shape[0],)](
            coded.stream, *coded.fixed, coded.steps, weight, *rest, EACH, coded.units, not INTERPRETED, pdl,
            num_warps=config["warps"], **early(pdl),
        )  # fmt: skip
    return weight
