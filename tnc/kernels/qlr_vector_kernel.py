"""Device code of ``y = dequant(Q) x + L (R x)`` in one launch, one or two tokens by float32 FMA.

Programs with low ids make ``t = R x`` and publish it; the others stream the codes, and the last K split of a
column block adds ``L t`` to its part. With several splits the parts go to a workspace, and the last program of a
column block to arrive adds them in a fixed order: results do not depend on the order of arrival. Counters are
left at zero, so a graph can be replayed.

A launch may serve several operators of one x: tuples hold what is theirs, and a block of rows belongs to one of them.
They have a t each, or one in common where they share a right factor.
"""

# ruff: noqa: ANN001, ANN201, RUF005, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.change_kernels import make
from tnc.kernels.decode import (
    chosen,
    entries,
    grid_wait,
    heard,
    lifted,
    member_of,
    nibbles,
    publish,
    scale_and_zero,
    scale_pair,
)
from tnc.kernels.factor_kernels import first_of_t, left_rows, left_vector, produce_vector
from tnc.kernels.lookup import level

AHEAD = tl.constexpr(8192)  # entries of R that a producer can hold before x is there


@triton.jit
def inputs(x, unit, last, K: tl.constexpr, EVEN: tl.constexpr, UC: tl.constexpr, H: tl.constexpr, UNIT: tl.constexpr,
           W: tl.constexpr = 4, order=None, factor=None):  # fmt: skip
    """float32 x as the words need it: for each code of a half word, the even and the odd columns (UC, 1, 16)."""
    values = ()
    h = tl.max_contiguous(tl.arange(0, 32)[None, None, :], (1, 1, 2 * W))
    for c in tl.static_range(H):
        k = tl.max_contiguous(unit * UNIT + 32 * c + h, (1, 1, 2 * W))
        if EVEN and order is None and factor is None:
            pair = tl.load(x + k)
        else:
            pair = entries(x, order, factor, k, (unit < last) & (k < K))
        even, odd = tl.split(tl.reshape(pair.to(tl.float32), (UC, 1, 16, 2)))
        values = values + (even, odd)
    return values


@triton.jit
def part(w, h, gw, xs, levels, one, JG: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr, TABLE: tl.constexpr,
         LANES: tl.constexpr, BN: tl.constexpr, UC: tl.constexpr, W: tl.constexpr = 4,
         ASM: tl.constexpr = False):  # fmt: skip
    """``sum(scale (code - zero) x)``, or ``sum(scale level x)``, over the codes of a thread's words: (BN,)."""
    STEP: tl.constexpr = 4 if BITS == 3 else BITS
    PARTS: tl.constexpr = 2 if BITS == 3 else 1
    COUNT: tl.constexpr = 16 // STEP // JG  # codes of a half word in one part and group
    PIECES: tl.constexpr = 16 // W  # threads that share a unit of a row
    total = tl.zeros((UC, BN, PIECES), tl.float32)
    for jg in tl.static_range(JG):
        p = tl.zeros((UC, BN, 16), tl.float32)
        plain = tl.zeros((UC, 1, 16), tl.float32)
        offset = tl.zeros((UC, 1, 16), tl.float32)
        for q in tl.static_range(PARTS):
            n = nibbles(w, h, q, BITS, ASM)
            for c in tl.static_range(COUNT):
                for e in tl.static_range(2):
                    value = xs[2 * (PARTS * (jg * COUNT + c) + q) + e]
                    if TABLE:
                        p += level(n, 16 * e + STEP * (jg * COUNT + c), levels, BITS, LANES) * value
                    else:
                        f, lift = lifted(n, 16 * e + STEP * (jg * COUNT + c), one, BITS)
                        p += f * value
                        plain += value
                        offset += lift * value
        p4 = tl.sum(tl.reshape(p, (UC, BN, PIECES, W)), 3)
        if SCALE == "pair":
            s, s1 = scale_pair(gw[jg])
            total += tl.where(tl.arange(0, PIECES)[None, None, :] < PIECES // 2, s, s1) * p4
        elif TABLE:
            total += scale_and_zero(gw[jg], SCALE)[0] * p4
        else:
            s, z = scale_and_zero(gw[jg], SCALE)
            p4 -= tl.sum(tl.reshape(offset, (UC, 1, PIECES, W)), 3)
            total += s * (p4 - z * tl.sum(tl.reshape(plain, (UC, 1, PIECES, W)), 3))
    return tl.sum(tl.sum(total, 2), 0)


@triton.jit
def fetch(lows, highs, groups, rows, firsts, block, real, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
          BN: tl.constexpr, W: tl.constexpr = 4):  # fmt: skip
    """Words and group words of ``BN`` rows: tiles (units, rows, words), ``W`` neighbouring words a thread."""
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    JG: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    which = member_of(block, firsts)
    N = chosen(rows, which)
    safe = tl.minimum((block - chosen(firsts, which)) * BN + tl.arange(0, BN), N - 1).to(tl.int64)[None, :, None]
    i = tl.max_contiguous(tl.arange(0, 16)[None, None, :], (1, 1, W))
    place = real.to(tl.int64) * N + safe
    w = tl.load(chosen(lows, which) + place * 16 + i)
    h = w
    if BITS == 3:
        h = tl.load(chosen(highs, which) + place * 8 + tl.max_contiguous(i % 8, (1, 1, W))) >> (2 * (i // 8))
    gw = ()
    for jg in tl.static_range(JG):
        group = tl.minimum(real * JG + jg, GROUPS - 1) if GROUP < UNIT else real // (GROUP // UNIT)
        gw = gw + (tl.load(chosen(groups, which) + group.to(tl.int64) * N + safe),)
    return w, h, gw


@triton.jit
def fetch_left(lefts, ranks, rows, firsts, block, BN: tl.constexpr, RC: tl.constexpr):
    """The first ``RC`` columns of L of a block's ``BN`` rows."""
    which = member_of(block, firsts)
    row = (block - chosen(firsts, which)) * BN + tl.arange(0, BN)
    return left_rows(chosen(lefts, which), tl.minimum(row, chosen(rows, which) - 1), 0, chosen(ranks, which), RC)


@triton.jit
def store_vector(slab, y, v, m, top, row, split, N, total, M: tl.constexpr, SK: tl.constexpr):
    """Store one token's part of a block: the answer itself if there is one split."""
    if SK == 1:
        tl.store(y + M * top + m * N + row, v.to(y.dtype.element_ty), mask=row < N)
    else:
        tl.store(slab + (split * M + m) * total + top + row, v, mask=row < N)


@triton.jit
def qlr_vector(x, made, change, ready, lows, highs, groups, lefts, rights, gains, levels, t, slab, counters, arrived, y,
               rows, ranks, firsts, tops, total, blocks, one, unity, M: tl.constexpr, K: tl.constexpr, IN: tl.constexpr,
               FORM: tl.constexpr, MAKERS: tl.constexpr, APART: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr,
               GROUP: tl.constexpr, TABLE: tl.constexpr, LANES: tl.constexpr, GAIN: tl.constexpr, RK: tl.constexpr,
               RB: tl.constexpr, KC: tl.constexpr, PRODUCERS: tl.constexpr, BN: tl.constexpr, UC: tl.constexpr,
               W: tl.constexpr, SK: tl.constexpr, STRIDE, LOOP: tl.constexpr, F32: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """One or two tokens by float32 FMA: a program keeps its columns of x in registers and walks over row blocks.

    A block is ``BN`` rows x ``UC`` units; the words of the next block are on their way while one is computed. ``made``
    is x behind its ``change`` where ``MAKERS`` programs make it first (`tnc.kernels.change_kernels.make`), for all that
    come after them or, if R sees x as it is (``APART``), after the producers; without makers x is scaled as it is read.
    """
    pid = tl.program_id(0) - MAKERS
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    H: tl.constexpr = UNIT // 32
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    US: tl.constexpr = (UNITS + SK - 1) // SK  # units of a split
    JG: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    EVEN: tl.constexpr = K == UC * SK * UNIT
    RC: tl.constexpr = RK if RK <= 128 else 128
    EACH: tl.constexpr = RK // RB  # producers of one t
    LOW: tl.constexpr = MAKERS + (PRODUCERS if APART else 0)
    WIDTH: tl.constexpr = K if MAKERS > 0 else IN  # of a row of what is read
    order = None if MAKERS > 0 else change[0]
    factor = None if MAKERS > 0 else change[1]
    if pid < 0:
        if MAKERS > 0:
            make(x, made, change, ready, pid + MAKERS, MAKERS, LOW, IN, K, FORM, unity, F32, PDL)
    elif pid < PRODUCERS:
        slot = pid // EACH
        own = t + slot * (M * RK)
        if APART:
            produce_vector(x, chosen(rights, slot), own, counters, pid % EACH, M, K, chosen(ranks, slot), RK, RB, KC,
                           PDL, None, None, K, None, LOW, PRODUCERS, STRIDE, pid == 0, AHEAD)  # fmt: skip
        else:
            produce_vector(made, chosen(rights, slot), own, counters, pid % EACH, M, K, chosen(ranks, slot), RK, RB,
                           KC, PDL, order, factor, WIDTH, ready if MAKERS > 0 else None, LOW, PRODUCERS,
                           STRIDE, pid == 0, AHEAD)  # fmt: skip
    else:
        start = (pid - PRODUCERS) // SK
        split = (pid - PRODUCERS) % SK
        unit = split * US + tl.arange(0, UC)[:, None, None]
        last = tl.minimum((split + 1) * US, UNITS)
        real = tl.minimum(unit, last - 1)  # past the end x is zero, the words are any
        w, h, gw = fetch(lows, highs, groups, rows, firsts, start, real, K, BITS, GROUP, BN, W)
        if PRODUCERS > 0:
            first = fetch_left(lefts, ranks, rows, firsts, start, BN, RC)
        grid_wait(PDL)
        fine = True
        if MAKERS > 0:
            fine = heard(ready, pid + MAKERS, LOW, tl.num_programs(0))
        xs = inputs(made, unit, last, K, EVEN, UC, H, UNIT, W, order, factor)
        if M == 2:
            xs1 = inputs(made + WIDTH, unit, last, K, EVEN, UC, H, UNIT, W, order, factor)
        held = -1  # whose t is in registers
        columns = tl.arange(0, RC)[None, :]
        t0 = tl.zeros((1, RC), tl.float32)
        t1 = tl.zeros((1, RC), tl.float32)
        for block in tl.range(start, blocks, STRIDE):
            which = member_of(block, firsts)
            N = chosen(rows, which)
            top = chosen(tops, which)
            row = (block - chosen(firsts, which)) * BN + tl.arange(0, BN)
            safe = tl.minimum(row, N - 1)
            if LOOP:
                after = tl.minimum(block + STRIDE, blocks - 1)
                w_next, h_next, gw_next = fetch(lows, highs, groups, rows, firsts, after, real, K, BITS, GROUP, BN, W)
                if PRODUCERS > 0:
                    first_next = fetch_left(lefts, ranks, rows, firsts, after, BN, RC)
            y0 = part(w, h, gw, xs, levels, one, JG, BITS, SCALE, TABLE, LANES, BN, UC, W, not F32)
            if M == 2:
                y1 = part(w, h, gw, xs1, levels, one, JG, BITS, SCALE, TABLE, LANES, BN, UC, W, not F32)
            if GAIN:
                gain = tl.load(chosen(gains, which))
                y0 *= gain
                if M == 2:
                    y1 *= gain
            if PRODUCERS > 0:
                if split == SK - 1:
                    slot = which if PRODUCERS > EACH else 0
                    if block == start:
                        fine &= heard(counters, start, 0, STRIDE)
                    own = t + slot * (M * RK)
                    if held != slot:
                        t0, t1 = first_of_t(own, columns, RK, M)
                        held = slot
                    left = chosen(lefts, which)
                    rank = chosen(ranks, which)
                    y0 += left_vector(first, t0, left, own, safe, rank, RK, RC)
                    if M == 2:
                        y1 += left_vector(first, t1, left, own + RK, safe, rank, RK, RC)
            if PRODUCERS > 0 or MAKERS > 0:
                y0 = tl.where(fine, y0, float("nan"))
                if M == 2:
                    y1 = tl.where(fine, y1, float("nan"))
            store_vector(slab, y, y0, 0, top, row, split, N, total, M, SK)
            if M == 2:
                store_vector(slab, y, y1, 1, top, row, split, N, total, M, SK)
            if SK > 1:
                if publish(arrived + block) == SK - 1:
                    for m in tl.static_range(M):
                        v = tl.zeros((BN,), tl.float32)
                        for each in tl.static_range(SK):
                            v += tl.load(slab + (each * M + m) * total + top + safe, volatile=True)
                        tl.store(y + M * top + m * N + row, v.to(y.dtype.element_ty), mask=row < N)
                    tl.atomic_xchg(arrived + block, 0, sem="relaxed")
            if LOOP:
                w, h, gw = w_next, h_next, gw_next
                if PRODUCERS > 0:
                    first = first_next
