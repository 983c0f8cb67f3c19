"""Device functions for formats whose levels are a table: each lane of a warp holds a level, a shuffle fetches it.

A shuffle reads the lane that the low five bits of a register name, so a code of b bits needs no mask where lane i
holds level ``i mod 2**b``: one shift and one shuffle a code, in float32 and exact, whatever the table. The choice of
a lane's level is written as immediates in the code (`lane_level`), which the assembler does once a program.
"""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl

from tnc.formats import table_values

_LANES = 32


@lru_cache(maxsize=64)
def levels_of(table: str) -> tuple[float, ...]:
    """Levels of a table by name, or of numbers joined by commas; padded by zeros to a power of two."""
    values = tuple(float(v) for v in table.split(",")) if "," in table else table_values(table)
    return values + (0.0,) * ((1 << (len(values) - 1).bit_length()) - len(values))


@lru_cache(maxsize=64)
def level_tensor(table: str, device: torch.device) -> torch.Tensor:
    """The levels on a device, float32; made on first use, which must not be inside a graph capture."""
    return torch.tensor(levels_of(table) if table else (0.0,), dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def lane_level(table: str, kind: str) -> str:
    """PTX that leaves in ``t`` the level of this lane: its float32 pattern, or that of 16 bits (``f16``, ``bf16``)."""
    if not table:
        return ""
    levels = levels_of(table)
    values = [_pattern(levels[lane % len(levels)], kind) for lane in range(_LANES)]
    lines = [".reg .b32 t, lane, c0, c1;", ".reg .pred p;", "mov.u32 lane, %laneid;", f"mov.b32 t, {values[0]};"]
    for lane in range(1, len(levels)):
        same = f"and.b32 c0, lane, {len(levels) - 1}; setp.eq.u32 p, c0, {lane};"
        lines.append(f"{same} selp.b32 t, {values[lane]}, t, p;")
    return " ".join(lines)


def _pattern(value: float, kind: str) -> int:
    if kind == "f32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    return int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF


@triton.jit
def level(words, at: tl.constexpr, levels, BITS: tl.constexpr, TABLE: tl.constexpr):
    """float32 level of the code whose lowest bit is ``at`` in int32 words; ``TABLE`` is `lane_level` or empty."""
    if TABLE == "":
        return tl.load(levels + ((words >> at) & ((1 << BITS) - 1)))
    else:
        code: tl.constexpr = f"{{ {TABLE} shr.u32 lane, $1, {at}; shfl.sync.idx.b32 $0, t, lane, 0x1f, 0xffffffff; }}"
        return tl.inline_asm_elementwise(code, "=r,r", [words], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def half_level(words, at: tl.constexpr, levels, BITS: tl.constexpr, TABLE: tl.constexpr, HALF: tl.constexpr):
    """Level in float16 (``HALF``) or bfloat16 of the code at bit ``at`` of int16 half words, two at a time."""
    if TABLE == "":
        value = tl.load(levels + ((words >> at) & ((1 << BITS) - 1)))
        return value.to(tl.float16) if HALF else value.to(tl.bfloat16)
    else:
        code: tl.constexpr = (
            f"{{ {TABLE} shr.u32 c0, $1, {at}; shr.u32 c1, $1, {at + 16}; shfl.sync.idx.b32 c0, t, c0, 0x1f, "
            "0xffffffff; shfl.sync.idx.b32 c1, t, c1, 0x1f, 0xffffffff; prmt.b32 $0, c0, c1, 0x5410; }"
        )
        if HALF:
            return tl.inline_asm_elementwise(code, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(code, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def wide_level(words, at: tl.constexpr, levels, BITS: tl.constexpr, TABLE: tl.constexpr):
    """float32 level of the code at bit ``at`` of int16 half words, two at a time."""
    if TABLE == "":
        return tl.load(levels + ((words >> at) & ((1 << BITS) - 1)))
    else:
        code: tl.constexpr = (
            f"{{ {TABLE} shr.u32 c0, $2, {at}; shr.u32 c1, $2, {at + 16}; shfl.sync.idx.b32 $0, t, c0, 0x1f, "
            "0xffffffff; shfl.sync.idx.b32 $1, t, c1, 0x1f, 0xffffffff; }"
        )
        return tl.inline_asm_elementwise(code, "=r,=r,r", [words], dtype=tl.float32, is_pure=True, pack=2)
