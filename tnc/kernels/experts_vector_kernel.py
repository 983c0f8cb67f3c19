"""Device code of grouped experts for few pairs, each by itself: ``dequant(Q_e) x + L_e (R_e x)`` by float32 FMA."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import grid_wait, handed_over, publish
from tnc.kernels.factor_kernels import first_of_t, left_rows, left_vector, produce_vector
from tnc.kernels.qlr_vector_kernel import fetch, inputs, part


@triton.jit
def experts_vector(x, low, high, groups, left, right, firsts, gain, levels, index, t, slab, counters, y, P, N, EXPERTS,
                   SHARE, blocks, one, K: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
                   TABLE: tl.constexpr, LANES: tl.constexpr, GAIN: tl.constexpr, RK: tl.constexpr, RB: tl.constexpr,
                   KC: tl.constexpr, BN: tl.constexpr, UC: tl.constexpr, SK: tl.constexpr, STRIDE, LOOP: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """Pair p takes row ``p // SHARE`` of x; pairs of no expert are zero. Otherwise as `qlr_vector`, one token.

    Low programs make t = R_e x of a pair; the others walk over blocks of ``BN`` rows of its expert with ``UC`` units of
    x in registers, and the last of ``SK`` splits adds L_e t.
    """
    pid = tl.program_id(0)
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    US: tl.constexpr = (UNITS + SK - 1) // SK  # units of a split
    JG: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    EVEN: tl.constexpr = K == UC * SK * UNIT
    RC: tl.constexpr = 16 if RK == 0 else (RK if RK <= 128 else 128)
    EACH: tl.constexpr = RK // RB  # producers of one t
    producers = P * EACH
    grid_wait(PDL)
    if pid < producers:
        pair = pid // EACH
        e = tl.load(index + pair)
        if (e >= 0) & (e < EXPERTS):
            begin = tl.load(firsts + e)
            rank = tl.load(firsts + e + 1) - begin
            own = t + pair * RK
            if rank > 0:
                produce_vector(x + (pair // SHARE).to(tl.int64) * K, right + begin.to(tl.int64) * K, own,
                               counters + 2 * pair, pid % EACH, 1, K, rank, RK, RB, KC, False)  # fmt: skip
            else:
                tl.store(own + pid % EACH * RB + tl.arange(0, RB), tl.zeros((RB,), tl.float32))
                publish(counters + 2 * pair)
    else:
        pair = (pid - producers) // (STRIDE * SK)
        start = (pid - producers) // SK % STRIDE
        split = (pid - producers) % SK
        e = tl.load(index + pair)
        answer = y + pair.to(tl.int64) * N
        if (e < 0) | (e >= EXPERTS):
            if split == 0:
                for block in tl.range(start, blocks, STRIDE):
                    row = block * BN + tl.arange(0, BN)
                    tl.store(answer + row, tl.zeros((BN,), y.dtype.element_ty), mask=row < N)
        else:
            unit = split * US + tl.arange(0, UC)[:, None, None]
            last = tl.minimum((split + 1) * US, UNITS)
            real = tl.minimum(unit, last - 1)  # past the end x is zero, the words are any
            wide = tl.cast(N, tl.int64)
            lows, highs = (low + e * (UNITS * wide * 16),), (high + e * (UNITS * wide * 8),)
            words = (groups + e * (GROUPS * wide),)
            w, h, gw = fetch(lows, highs, words, (N,), (0,), start, real, K, BITS, GROUP, BN)
            begin = tl.load(firsts + e)
            rank = tl.load(firsts + e + 1) - begin
            factor = left + begin * wide
            if RK > 0:
                first = left_rows(factor, tl.minimum(start * BN + tl.arange(0, BN), N - 1), 0, rank, RC)
            xs = inputs(x + (pair // SHARE).to(tl.int64) * K, unit, last, K, EVEN, UC, UNIT // 32, UNIT)
            fine = True
            own = t + pair * RK
            columns = tl.arange(0, RC)[None, :]
            inner = tl.zeros((1, RC), tl.float32)
            for block in tl.range(start, blocks, STRIDE):
                row = block * BN + tl.arange(0, BN)
                safe = tl.minimum(row, N - 1)
                if LOOP:
                    after = tl.minimum(block + STRIDE, blocks - 1)
                    w_next, h_next, gw_next = fetch(lows, highs, words, (N,), (0,), after, real, K, BITS, GROUP, BN)
                    if RK > 0:
                        first_next = left_rows(factor, tl.minimum(after * BN + tl.arange(0, BN), N - 1), 0, rank, RC)
                v = part(w, h, gw, xs, levels, one, JG, BITS, SCALE, TABLE, LANES, BN, UC)
                if GAIN:
                    v *= tl.load(gain + e)
                if RK > 0:
                    if split == SK - 1:
                        if block == start:
                            fine = handed_over(counters + 2 * pair, EACH, STRIDE)
                            inner, _ = first_of_t(own, columns, RK, 1)
                        v = tl.where(fine, v + left_vector(first, inner, factor, own, safe, rank, RK, RC), float("nan"))
                if SK == 1:
                    tl.store(answer + row, v.to(y.dtype.element_ty), mask=row < N)
                else:
                    piece = slab + pair * wide + row
                    tl.store(piece + split * (P * wide), v, mask=row < N)
                    arrived = counters + 2 * P + pair * blocks + block
                    if publish(arrived) == SK - 1:
                        v = tl.zeros((BN,), tl.float32)
                        for each in tl.static_range(SK):
                            v += tl.load(piece + each * (P * wide), mask=row < N, other=0.0, volatile=True)
                        tl.store(answer + row, v.to(y.dtype.element_ty), mask=row < N)
                        tl.atomic_xchg(arrived, 0, sem="relaxed")
                if LOOP:
                    w, h, gw = w_next, h_next, gw_next
                    if RK > 0:
                        first = first_next
