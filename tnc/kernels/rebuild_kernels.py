"""Device code that writes a dense weight once, at memory speed: ``dequant(Q) + L R`` and two-core MPOs."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import centred, dot_apart, grid_wait, half_nibbles, scale_and_zero, scale_pair
from tnc.kernels.lookup import wide_level


@triton.jit
def rebuild_qlr(low, high, groups, left, right, gain, levels, weight, N, RANK, K: tl.constexpr, BITS: tl.constexpr,
                SCALE: tl.constexpr, GROUP: tl.constexpr, TABLE: tl.constexpr, LANES: tl.constexpr,
                GAIN: tl.constexpr, RK: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, UP: tl.constexpr,
                STAGES: tl.constexpr, F32: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``BN`` rows and ``UP`` units of ``dequant(Q) + L R``, added in float32 and rounded once, 32 columns at a time."""
    STEP: tl.constexpr = 4 if BITS == 3 else BITS
    PARTS: tl.constexpr = 2 if BITS == 3 else 1
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    COUNT: tl.constexpr = 16 // STEP
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    wide = tl.cast(N, tl.int64)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(row, N - 1).to(tl.int64)
    h = tl.arange(0, 32)
    r = tl.arange(0, RB)
    grid_wait(PDL)
    if RK > 0:
        first = tl.load(left + safe[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0)
    for unit in tl.range(tl.program_id(1) * UP, tl.minimum((tl.program_id(1) + 1) * UP, UNITS), num_stages=STAGES):
        place = unit * wide + safe
        w = tl.load(low + place[:, None] * 32 + h[None, :])
        top = w
        if BITS == 3:
            top = tl.load(high + place[:, None] * 16 + (h % 16)[None, :]) >> (2 * (h // 16)).to(tl.int16)[None, :]
        for part in tl.static_range(PARTS):
            n = half_nibbles(w, top, part, BITS, ASM)
            for c in tl.static_range(COUNT):
                start = unit * UNIT + 32 * (PARTS * c + part)
                group = tl.minimum(start // GROUP, GROUPS - 1)
                k = start + h
                word = tl.load(groups + group * wide + safe)
                if TABLE:
                    code = wide_level(n, STEP * c, levels, BITS, LANES)
                    if SCALE == "pair":
                        s, s1 = scale_pair(word)
                        value = code * tl.where((h < 16)[None, :], s[:, None], s1[:, None])
                    else:
                        value = code * scale_and_zero(word, SCALE)[0][:, None]
                else:
                    s, z = scale_and_zero(word, SCALE)
                    if ASM and BITS != 8:
                        z += 1024 if left.dtype.element_ty == tl.float16 else 128
                    z = tl.broadcast_to(z.to(left.dtype.element_ty)[:, None], (BN, 32))
                    code = centred(n, z, STEP * c, BITS, left.dtype.element_ty == tl.float16, ASM)
                    value = code.to(tl.float32) * s[:, None]
                if GAIN:
                    value *= tl.load(gain)
                if RK > 0:
                    acc = tl.zeros((BN, 32), tl.float32)
                    for r0 in tl.static_range(0, RK, RB):
                        rank = r0 + r
                        a = first
                        if r0 > 0:
                            a = tl.load(
                                left + safe[:, None] * RANK + rank[None, :], mask=(rank < RANK)[None, :], other=0.0
                            )
                        b = tl.load(right + rank[:, None].to(tl.int64) * K + k[None, :],
                                    mask=(rank < RANK)[:, None] & (k < K)[None, :], other=0.0)  # fmt: skip
                        acc = dot_apart(a, b.to(a.dtype), acc, F32)
                    value += acc
                inside = (row < N)[:, None] & (k < K)[None, :]
                tl.store(weight + safe[:, None] * K + k[None, :], value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def first_core(first, d, inside, D, DS):
    """Entries ``d`` of the bond (DB,) of the places ``first`` in the first core, (DB, places)."""
    return tl.load(first[None, :] + d[:, None] * DS, mask=(d < D)[:, None] & inside[None, :], other=0.0)


@triton.jit
def rebuild_mpo2(first, second, weight, O1, I1, O2, I2, D, OS, IS, DS, OW: tl.constexpr, IW: tl.constexpr,
                 I2P: tl.constexpr, DB: tl.constexpr, DP: tl.constexpr, OB: tl.constexpr, F32: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """``OW`` values of o1, ``IW`` of i1 and ``OB`` of o2: products (o1 i1, D) (D, i2), one a value of o2, rounded once.

    ``OS``, ``IS`` and ``DS`` are the strides of o1, i1 and the bond in the first core, which is read once.
    """
    place = tl.arange(0, OW * IW)
    o1 = tl.program_id(0) * OW + place % OW
    i1 = tl.program_id(2) * IW + place // OW
    i2 = tl.arange(0, I2P)
    inside = (o1 < O1) & (i1 < I1)
    own = first + o1.to(tl.int64) * OS + i1 * IS
    grid_wait(PDL)
    a = first_core(own, tl.arange(0, DB), inside, D, DS)
    for each in tl.range(tl.program_id(1) * OB, tl.minimum((tl.program_id(1) + 1) * OB, O2)):
        acc = tl.zeros((OW * IW, I2P), tl.float32)
        for d0 in tl.static_range(0, DP, DB):
            d = d0 + tl.arange(0, DB)
            if DP > DB:
                a = first_core(own, d, inside, D, DS)
            b = tl.load(second + (d[:, None].to(tl.int64) * O2 + each) * I2 + i2[None, :],
                        mask=(d < D)[:, None] & (i2 < I2)[None, :], other=0.0)  # fmt: skip
            acc = dot_apart(tl.trans(a), b, acc, F32)
        row = ((o1.to(tl.int64) * O2 + each) * I1 + i1) * I2
        tl.store(weight + row[:, None] + i2[None, :], acc.to(weight.dtype.element_ty),
                 mask=inside[:, None] & (i2 < I2)[None, :])  # fmt: skip
