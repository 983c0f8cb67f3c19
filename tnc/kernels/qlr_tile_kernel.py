"""Device code of ``y = dequant(Q) x + L (R x)`` in one launch, up to 64 tokens by tensor cores."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import (
    centred,
    chosen,
    dot,
    dot_apart,
    grid_wait,
    half_nibbles,
    handed_over,
    member_of,
    publish,
    scale_and_zero,
    scale_pair,
)
from tnc.kernels.factor_kernels import produce_tile
from tnc.kernels.lookup import half_level


@triton.jit
def qlr_tile(x, lows, highs, groups, lefts, rights, gains, levels, t, tslab, slab, counters, y, M, rows, ranks, firsts,
             tops, total, blocks, BM: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr,
             GROUP: tl.constexpr, TABLE: tl.constexpr, LANES: tl.constexpr, GAIN: tl.constexpr, RK: tl.constexpr,
             RB: tl.constexpr, KS: tl.constexpr, PRODUCERS: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
             SK: tl.constexpr, STAGES: tl.constexpr, F32: tl.constexpr, ASM: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """Up to ``BM`` tokens by tensor cores: ``code - zero`` is exact, the scale multiplies the group's sum.

    Levels of a table are rounded to the dtype of x; where 16 columns share a scale it multiplies the level.

    A dot of 32 columns takes one code of every half word, so the words go from shared memory to the registers that
    the tensor cores read, and are decoded there.
    """
    pid = tl.program_id(0)
    STEP: tl.constexpr = 4 if BITS == 3 else BITS
    PARTS: tl.constexpr = 2 if BITS == 3 else 1
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    JG: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    COUNT: tl.constexpr = 16 // STEP // JG
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    RANKS: tl.constexpr = PRODUCERS // KS  # blocks of ranks of every t
    EACH: tl.constexpr = RK // RB * KS  # producers of one t
    if pid < PRODUCERS:
        slot = pid // EACH
        produce_tile(x, chosen(rights, slot), t + slot * (BM * RK), tslab + slot * (KS * BM * RK), counters,
                     counters + 2 + slot * (RK // RB), pid % EACH, M, BM, K, chosen(ranks, slot), RK, RB, KS, F32,
                     PDL)  # fmt: skip
    else:
        block = (pid - PRODUCERS) // SK
        split = (pid - PRODUCERS) % SK
        which = member_of(block, firsts)
        N = chosen(rows, which)
        low = chosen(lows, which)
        scales = chosen(groups, which)
        column = (block - chosen(firsts, which)) * BN + tl.arange(0, BN)
        safe = tl.minimum(column, N - 1)
        wide = tl.cast(N, tl.int64)
        m = tl.arange(0, BM)[:, None]
        i = tl.arange(0, 32)
        start = m.to(tl.int64) * K
        acc = tl.zeros((BM, BN), tl.float32)
        grid_wait(PDL)
        for unit in tl.range(split * STEPS, tl.minimum((split + 1) * STEPS, UNITS), num_stages=STAGES):
            place = unit * wide + safe
            w = tl.load(low + place[None, :] * 32 + i[:, None])
            h = w
            if BITS == 3:
                h = (
                    tl.load(chosen(highs, which) + place[None, :] * 16 + (i % 16)[:, None])
                    >> (2 * (i // 16)).to(tl.int16)[:, None]
                )
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
                        a = tl.load(x + start + k, mask=(m < M) & (k < K), other=0.0)
                        if TABLE:
                            b = half_level(n, STEP * (jg * COUNT + c), levels, BITS, LANES, HALF)
                            if SCALE == "pair":
                                b = (b.to(tl.float32) * z.to(tl.float32)).to(
                                    x.dtype.element_ty
                                )  # bf16 products of the interpreter are wrong
                        else:
                            b = centred(n, z, STEP * (jg * COUNT + c), BITS, HALF, ASM)
                        p = dot(a, b, p, F32)
                acc += p if SCALE == "pair" else s[None, :] * p
        if GAIN:
            acc *= tl.load(chosen(gains, which))
        if PRODUCERS > 0:
            if split == SK - 1:
                fine = handed_over(counters, RANKS, blocks)
                left = chosen(lefts, which)
                rank = chosen(ranks, which)
                own = t + (which if RANKS > RK // RB else 0) * (BM * RK)
                for r0 in tl.static_range(0, RK, RB):
                    r = r0 + tl.arange(0, RB)
                    b = tl.load(
                        left + safe.to(tl.int64)[None, :] * rank + r[:, None], mask=(r < rank)[:, None], other=0.0
                    )
                    a = tl.load(own + m * RK + r[None, :], volatile=True)
                    acc = dot_apart(a, b.to(a.dtype), acc, F32)
                acc = tl.where(fine, acc, float("nan"))
        top = chosen(tops, which)
        place = M * tl.cast(top, tl.int64) + m * wide + column[None, :]
        inside = (m < M) & (column < N)[None, :]
        if SK == 1:
            tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
        else:
            size = M * tl.cast(total, tl.int64)
            tl.store(slab + split * size + place, acc, mask=inside)
            if publish(counters + 2 + RANKS + block) == SK - 1:
                acc = tl.zeros((BM, BN), tl.float32)
                for each in tl.static_range(SK):
                    acc += tl.load(slab + each * size + place, mask=inside, other=0.0, volatile=True)
                tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
                tl.atomic_xchg(counters + 2 + RANKS + block, 0, sem="relaxed")
