"""Device code of ``y = dequant(Q) x + L (R x)`` in one launch, up to 64 tokens by tensor cores."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import (
    centred,
    dot,
    dot_apart,
    grid_wait,
    half_nibbles,
    handed_over,
    publish,
    scale_and_zero,
)
from tnc.kernels.factor_kernels import produce_tile


@triton.jit
def qlr_tile(x, low, high, groups, left, right, t, tslab, slab, counters, y, M, N, RANK, BM: tl.constexpr,
             K: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, RK: tl.constexpr,
             RB: tl.constexpr, KS: tl.constexpr, PRODUCERS: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
             SK: tl.constexpr, STAGES: tl.constexpr, F32: tl.constexpr, ASM: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """Up to ``BM`` tokens by tensor cores: ``code - zero`` is exact, the scale multiplies the group's sum.

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
    RANKS: tl.constexpr = PRODUCERS // KS
    if pid < PRODUCERS:
        produce_tile(x, right, t, tslab, counters, pid, M, BM, K, RANK, RK, RB, KS, F32, PDL)
    else:
        block = (pid - PRODUCERS) // SK
        split = (pid - PRODUCERS) % SK
        blocks = tl.cdiv(N, BN)
        column = block * BN + tl.arange(0, BN)
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
                h = tl.load(high + place[None, :] * 16 + (i % 16)[:, None]) >> (2 * (i // 16)).to(tl.int16)[:, None]
            for jg in tl.static_range(JG):
                group = tl.minimum(unit * JG + jg, GROUPS - 1) if GROUP < UNIT else unit // (GROUP // UNIT)
                s, z = scale_and_zero(tl.load(groups + group * wide + safe), HALF)
                if ASM and BITS != 8:
                    z += 1024 if x.dtype.element_ty == tl.float16 else 128
                z = tl.broadcast_to(z.to(x.dtype.element_ty)[None, :], (32, BN))
                p = tl.zeros((BM, BN), tl.float32)
                for part in tl.static_range(PARTS):
                    n = half_nibbles(w, h, part, BITS, ASM)
                    for c in tl.static_range(COUNT):
                        k = unit * UNIT + 32 * (PARTS * (jg * COUNT + c) + part) + i[None, :]
                        a = tl.load(x + start + k, mask=(m < M) & (k < K), other=0.0)
                        b = centred(n, z, STEP * (jg * COUNT + c), BITS, x.dtype.element_ty == tl.float16, ASM)
                        p = dot(a, b, p, F32)
                acc += s[None, :] * p
        if PRODUCERS > 0:
            if split == SK - 1:
                fine = handed_over(counters, RANKS, blocks)
                for r0 in tl.static_range(0, RK, RB):
                    r = r0 + tl.arange(0, RB)
                    b = tl.load(
                        left + safe.to(tl.int64)[None, :] * RANK + r[:, None], mask=(r < RANK)[:, None], other=0.0
                    )
                    a = tl.load(t + m * RK + r[None, :], volatile=True)
                    acc = dot_apart(a, b.to(a.dtype), acc, F32)
                acc = tl.where(fine, acc, float("nan"))
        place = m * wide + column[None, :]
        inside = (m < M) & (column < N)[None, :]
        if SK == 1:
            tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
        else:
            size = M * wide
            tl.store(slab + split * size + place, acc, mask=inside)
            if publish(counters + 2 + RANKS + block) == SK - 1:
                acc = tl.zeros((BM, BN), tl.float32)
                for each in tl.static_range(SK):
                    acc += tl.load(slab + each * size + place, mask=inside, other=0.0, volatile=True)
                tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
                tl.atomic_xchg(counters + 2 + RANKS + block, 0, sem="relaxed")
