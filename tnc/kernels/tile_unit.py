"""Device code of one unit of code words times up to 64 rows of x, by tensor cores."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import centred, dot, half_nibbles, scale_and_zero, scale_pair
from tnc.kernels.lookup import half_level


@triton.jit
def unit_product(acc, x, start, real, low, high, scales, levels, unit, wide, safe, BM: tl.constexpr, BN: tl.constexpr,
                 K: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, TABLE: tl.constexpr,
                 LANES: tl.constexpr, F32: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """``acc`` plus the product of ``BM`` rows of x, which begin at ``start``, with one unit of ``BN`` rows of Q.

    ``code - zero`` is exact and the scale multiplies the group's sum; levels of a table are rounded to the dtype of x,
    and where 16 columns share a scale it multiplies the level. A dot of 32 columns takes one code of every half word,
    so the words go from shared memory to the registers that the tensor cores read, and are decoded there.
    """
    STEP: tl.constexpr = 4 if BITS == 3 else BITS
    PARTS: tl.constexpr = 2 if BITS == 3 else 1
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    JG: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    COUNT: tl.constexpr = 16 // STEP // JG
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    i = tl.arange(0, 32)
    place = unit * wide + safe
    w = tl.load(low + place[None, :] * 32 + i[:, None])
    h = w
    if BITS == 3:
        h = tl.load(high + place[None, :] * 16 + (i % 16)[:, None]) >> (2 * (i // 16)).to(tl.int16)[:, None]
    for jg in tl.static_range(JG):
        group = tl.minimum(unit * JG + jg, GROUPS - 1) if GROUP < UNIT else unit // (GROUP // UNIT)
        word = tl.load(scales + group * wide + safe)
        if SCALE == "pair":
            s, s1 = scale_pair(word)
            z = tl.where((i < 16)[:, None], s[None, :], s1[None, :]).to(x.dtype.element_ty)
        elif TABLE:
            s, z = scale_and_zero(word, SCALE)
        else:
            s, z = scale_and_zero(word, SCALE)
            if ASM and BITS != 8:
                z += 1024 if HALF else 128
            z = tl.broadcast_to(z.to(x.dtype.element_ty)[None, :], (32, BN))
        p = tl.zeros((BM, BN), tl.float32)
        for part in tl.static_range(PARTS):
            n = half_nibbles(w, h, part, BITS, ASM)
            for c in tl.static_range(COUNT):
                k = unit * UNIT + 32 * (PARTS * (jg * COUNT + c) + part) + i[None, :]
                a = tl.load(x + start + k, mask=real & (k < K), other=0.0)
                if TABLE:
                    b = half_level(n, STEP * (jg * COUNT + c), levels, BITS, LANES, HALF)
                    if SCALE == "pair":  # the interpreter's bfloat16 products are wrong
                        b = (b.to(tl.float32) * z.to(tl.float32)).to(x.dtype.element_ty)
                else:
                    b = centred(n, z, STEP * (jg * COUNT + c), BITS, HALF, ASM)
                p = dot(a, b, p, F32)
        acc += p if SCALE == "pair" else s[None, :] * p
    return acc
