"""Device code of ``y = dequant(Q) x + L (R x)`` in one launch: two tokens by FMA, more by tensor cores.

Programs with low ids make ``t = R x`` and publish it; the others stream the codes, and the last K split of a
column block adds ``L t`` to its part. With several splits the parts go to a workspace, and the last program of a
column block to arrive adds them in a fixed order: results do not depend on the order of arrival. Counters are
left at zero, so a graph can be replayed.
"""

# ruff: noqa: ANN001, ANN201, RUF005, SIM102, SIM108 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import (
    centred,
    dot,
    dot_apart,
    grid_wait,
    half_nibbles,
    lifted,
    nibbles,
    publish,
    scale_and_zero,
    wait_for,
)


@triton.jit
def produce_vector(x, right, t, flag, pid, M: tl.constexpr, K: tl.constexpr, RANK, RK: tl.constexpr, RB: tl.constexpr,
                   KC: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``RB`` rows of t = R x (M, RK) in float32, over all of K."""
    row = pid * RB + tl.arange(0, RB)
    start = tl.minimum(row, RANK - 1).to(tl.int64)[:, None] * K
    a0 = tl.zeros((RB,), tl.float32)
    a1 = tl.zeros((RB,), tl.float32)
    grid_wait(PDL)
    for k0 in tl.static_range(0, K, KC):
        k = k0 + tl.arange(0, KC)[None, :]
        r = tl.load(right + start + k, mask=k < K, other=0.0).to(tl.float32)
        a0 += tl.sum(r * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32), 1)
        if M == 2:
            a1 += tl.sum(r * tl.load(x + K + k, mask=k < K, other=0.0).to(tl.float32), 1)
    tl.store(t + row, tl.where(row < RANK, a0, 0.0), mask=row < RK)
    if M == 2:
        tl.store(t + RK + row, tl.where(row < RANK, a1, 0.0), mask=row < RK)
    publish(flag)


@triton.jit
def left_rows(left, safe, r0, RANK, RC: tl.constexpr):
    """``RC`` columns of L from ``r0`` for the rows ``safe``."""
    r = r0 + tl.arange(0, RC)[None, :]
    return tl.load(left + safe[:, None].to(tl.int64) * RANK + r, mask=r < RANK, other=0.0)


@triton.jit
def left_vector(first, inner, left, t, safe, RANK, RK: tl.constexpr, RC: tl.constexpr):
    """``L t`` for the rows ``safe``; the ``first`` columns of L and the ``inner`` first entries of t are there."""
    r = tl.arange(0, RC)[None, :]
    y = tl.sum(first.to(tl.float32) * inner, 1)
    for r0 in tl.static_range(RC, RK, RC):
        factor = left_rows(left, safe, r0, RANK, RC)
        y += tl.sum(factor.to(tl.float32) * tl.load(t + r0 + r, volatile=True), 1)
    return y


@triton.jit
def inputs(x, unit, last, K: tl.constexpr, EVEN: tl.constexpr, UC: tl.constexpr, H: tl.constexpr, UNIT: tl.constexpr):
    """float32 x as the words need it: for each code of a half word, the even and the odd columns (UC, 1, 16)."""
    values = ()
    h = tl.max_contiguous(tl.arange(0, 32)[None, None, :], (1, 1, 8))
    for c in tl.static_range(H):
        k = tl.max_contiguous(unit * UNIT + 32 * c + h, (1, 1, 8))
        if EVEN:
            pair = tl.load(x + k)
        else:
            pair = tl.load(x + k, mask=(unit < last) & (k < K), other=0.0)
        even, odd = tl.split(tl.reshape(pair.to(tl.float32), (UC, 1, 16, 2)))
        values = values + (even, odd)
    return values


@triton.jit
def part(w, h, gw, xs, one, JG: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr,
         BN: tl.constexpr, UC: tl.constexpr):  # fmt: skip
    """``sum(scale (code - zero) x)`` over the codes of a thread's words: (BN,)."""
    STEP: tl.constexpr = 4 if BITS == 3 else BITS
    PARTS: tl.constexpr = 2 if BITS == 3 else 1
    COUNT: tl.constexpr = 16 // STEP // JG  # codes of a half word in one part and group
    total = tl.zeros((UC, BN, 4), tl.float32)
    for jg in tl.static_range(JG):
        s, z = scale_and_zero(gw[jg], HALF)
        p = tl.zeros((UC, BN, 16), tl.float32)
        plain = tl.zeros((UC, 1, 16), tl.float32)
        offset = tl.zeros((UC, 1, 16), tl.float32)
        for q in tl.static_range(PARTS):
            n = nibbles(w, h, q, BITS)
            for c in tl.static_range(COUNT):
                for e in tl.static_range(2):
                    f, lift = lifted(n, 16 * e + STEP * (jg * COUNT + c), one, BITS)
                    value = xs[2 * (PARTS * (jg * COUNT + c) + q) + e]
                    p += f * value
                    plain += value
                    offset += lift * value
        p4 = tl.sum(tl.reshape(p, (UC, BN, 4, 4)), 3) - tl.sum(tl.reshape(offset, (UC, 1, 4, 4)), 3)
        total += s * (p4 - z * tl.sum(tl.reshape(plain, (UC, 1, 4, 4)), 3))
    return tl.sum(tl.sum(total, 2), 0)


@triton.jit
def fetch(low, high, groups, block, real, N, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
          BN: tl.constexpr):  # fmt: skip
    """Words and group words of ``BN`` rows: tiles (units, rows, words), 4 neighbouring words a thread."""
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    JG: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    safe = tl.minimum(block * BN + tl.arange(0, BN), N - 1).to(tl.int64)[None, :, None]
    i = tl.max_contiguous(tl.arange(0, 16)[None, None, :], (1, 1, 4))
    place = real.to(tl.int64) * N + safe
    w = tl.load(low + place * 16 + i)
    h = w
    if BITS == 3:
        h = tl.load(high + place * 8 + tl.max_contiguous(i % 8, (1, 1, 4))) >> (2 * (i // 8))
    gw = ()
    for jg in tl.static_range(JG):
        group = tl.minimum(real * JG + jg, GROUPS - 1) if GROUP < UNIT else real // (GROUP // UNIT)
        gw = gw + (tl.load(groups + group.to(tl.int64) * N + safe),)
    return w, h, gw


@triton.jit
def store_vector(slab, y, v, m, row, split, N, M: tl.constexpr, SK: tl.constexpr):
    """Store one token's part of a block: the answer itself if there is one split."""
    if SK == 1:
        tl.store(y + m * N + row, v.to(y.dtype.element_ty), mask=row < N)
    else:
        tl.store(slab + (split * M + m) * N + row, v, mask=row < N)


@triton.jit
def qlr_vector(x, low, high, groups, left, right, t, slab, counters, y, N, RANK, one, M: tl.constexpr, K: tl.constexpr,
               BITS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, RK: tl.constexpr, RB: tl.constexpr,
               KC: tl.constexpr, PRODUCERS: tl.constexpr, BN: tl.constexpr, UC: tl.constexpr, SK: tl.constexpr,
               STRIDE, LOOP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One or two tokens by float32 FMA: a program keeps its columns of x in registers and walks over row blocks.

    A block is ``BN`` rows x ``UC`` units; the words of the next block are on their way while one is computed.
    """
    pid = tl.program_id(0)
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    H: tl.constexpr = UNIT // 32
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    US: tl.constexpr = (UNITS + SK - 1) // SK  # units of a split
    JG: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    EVEN: tl.constexpr = K == UC * SK * UNIT
    RC: tl.constexpr = RK if RK <= 128 else 128
    if pid < PRODUCERS:
        produce_vector(x, right, t, counters, pid, M, K, RANK, RK, RB, KC, PDL)
    else:
        start = (pid - PRODUCERS) // SK
        split = (pid - PRODUCERS) % SK
        blocks = tl.cdiv(N, BN)
        unit = split * US + tl.arange(0, UC)[:, None, None]
        last = tl.minimum((split + 1) * US, UNITS)
        real = tl.minimum(unit, last - 1)  # past the end x is zero, the words are any
        w, h, gw = fetch(low, high, groups, start, real, N, K, BITS, GROUP, BN)
        if PRODUCERS > 0:
            first = left_rows(left, tl.minimum(start * BN + tl.arange(0, BN), N - 1), 0, RANK, RC)
        grid_wait(PDL)
        xs = inputs(x, unit, last, K, EVEN, UC, H, UNIT)
        if M == 2:
            xs1 = inputs(x + K, unit, last, K, EVEN, UC, H, UNIT)
        fine = True
        ranks = tl.arange(0, RC)[None, :]
        t0 = tl.zeros((1, RC), tl.float32)
        t1 = tl.zeros((1, RC), tl.float32)
        for block in tl.range(start, blocks, STRIDE):
            row = block * BN + tl.arange(0, BN)
            safe = tl.minimum(row, N - 1)
            if LOOP:
                after = tl.minimum(block + STRIDE, blocks - 1)
                w_next, h_next, gw_next = fetch(low, high, groups, after, real, N, K, BITS, GROUP, BN)
                if PRODUCERS > 0:
                    first_next = left_rows(left, tl.minimum(after * BN + tl.arange(0, BN), N - 1), 0, RANK, RC)
            y0 = part(w, h, gw, xs, one, JG, BITS, HALF, BN, UC)
            if M == 2:
                y1 = part(w, h, gw, xs1, one, JG, BITS, HALF, BN, UC)
            if PRODUCERS > 0:
                if split == SK - 1:
                    if block == start:
                        fine = wait_for(counters, PRODUCERS)
                        done = tl.atomic_add(counters + 1, 1, sem="relaxed")
                        if done == STRIDE - 1:
                            tl.atomic_xchg(counters, 0, sem="relaxed")
                            tl.atomic_xchg(counters + 1, 0, sem="relaxed")
                        t0 = tl.load(t + ranks, volatile=True)
                        if M == 2:
                            t1 = tl.load(t + RK + ranks, volatile=True)
                    y0 = tl.where(fine, y0 + left_vector(first, t0, left, t, safe, RANK, RK, RC), float("nan"))
                    if M == 2:
                        y1 = tl.where(fine, y1 + left_vector(first, t1, left, t + RK, safe, RANK, RK, RC), float("nan"))
            store_vector(slab, y, y0, 0, row, split, N, M, SK)
            if M == 2:
                store_vector(slab, y, y1, 1, row, split, N, M, SK)
            if SK > 1:
                if publish(counters + 2 + block) == SK - 1:
                    for m in tl.static_range(M):
                        v = tl.zeros((BN,), tl.float32)
                        for each in tl.static_range(SK):
                            v += tl.load(slab + (each * M + m) * N + safe, volatile=True)
                        tl.store(y + m * N + row, v.to(y.dtype.element_ty), mask=row < N)
                    tl.atomic_xchg(counters + 2 + block, 0, sem="relaxed")
            if LOOP:
                w, h, gw = w_next, h_next, gw_next
                if PRODUCERS > 0:
                    first = first_next


@triton.jit
def produce_tile(x, right, t, slab, counters, pid, M, BM: tl.constexpr, K: tl.constexpr, RANK, RK: tl.constexpr,
                 RB: tl.constexpr, KS: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``RB`` ranks of t and one of ``KS`` chunks of K; the last chunk to arrive adds them and publishes t."""
    block = pid // KS
    chunk = pid % KS
    m = tl.arange(0, BM)[:, None]
    rank = block * RB + tl.arange(0, RB)
    safe = tl.minimum(rank, RANK - 1).to(tl.int64)
    STEPS: tl.constexpr = ((K + 63) // 64 + KS - 1) // KS
    acc = tl.zeros((BM, RB), tl.float32)
    grid_wait(PDL)
    for step in range(chunk * STEPS, (chunk + 1) * STEPS):
        k = step * 64 + tl.arange(0, 64)
        a = tl.load(x + m.to(tl.int64) * K + k[None, :], mask=(m < M) & (k < K)[None, :], other=0.0)
        b = tl.load(right + safe[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0.0)
        acc = dot(a, b.to(a.dtype), acc, F32)
    acc = tl.where((rank < RANK)[None, :], acc, 0.0)
    if KS > 1:
        tl.store(slab + (chunk * BM + m) * RK + rank[None, :], acc)
        if publish(counters + 2 + block) == KS - 1:
            acc = tl.zeros((BM, RB), tl.float32)
            for each in tl.static_range(KS):
                acc += tl.load(slab + (each * BM + m) * RK + rank[None, :], volatile=True)
            tl.atomic_xchg(counters + 2 + block, 0, sem="relaxed")
            tl.store(t + m * RK + rank[None, :], acc.to(t.dtype.element_ty))
            publish(counters)
    else:
        tl.store(t + m * RK + rank[None, :], acc.to(t.dtype.element_ty))
        publish(counters)


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
                fine = wait_for(counters, RANKS)
                done = tl.atomic_add(counters + 1, 1, sem="relaxed")
                for r0 in tl.static_range(0, RK, RB):
                    r = r0 + tl.arange(0, RB)
                    b = tl.load(
                        left + safe.to(tl.int64)[None, :] * RANK + r[:, None], mask=(r < RANK)[:, None], other=0.0
                    )
                    a = tl.load(t + m * RK + r[None, :], volatile=True)
                    acc = dot_apart(a, b.to(a.dtype), acc, F32)
                acc = tl.where(fine, acc, float("nan"))
                if done == blocks - 1:
                    tl.atomic_xchg(counters, 0, sem="relaxed")
                    tl.atomic_xchg(counters + 1, 0, sem="relaxed")
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
