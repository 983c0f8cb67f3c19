"""Device code of trellis-coded weights for more tokens: a tile by tensor cores, and the weight written once."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, dot_apart, grid_wait, handed_over, publish
from tnc.kernels.factor_kernels import produce_tile
from tnc.kernels.trellis_kernels import fix_of, item_of, level


@triton.jit
def levels_at(stream, unit, r, column, LINES: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr,
              ASM: tl.constexpr):  # fmt: skip
    """float32 levels of the entries in rows r of a unit and columns, as the words show them; shapes broadcast."""
    PLANES: tl.constexpr = 1 if BITS == 2 else (3 if BITS == 3 else 2)
    R: tl.constexpr = 32 * PLANES // BITS
    end = BITS * (r + 1)
    plane = (end - 1) // 32
    shift = 32 * (plane + 1) - end
    base = stream + (unit.to(tl.int64) * PLANES + 1) * LINES
    low = tl.load(base + (plane * LINES + r) + column).to(tl.uint32, bitcast=True)
    high = tl.load(base + ((plane - 1) * LINES + r + tl.where(plane == 0, R, 0)) + column).to(tl.uint32, bitcast=True)
    # 31 at most a shift: the word before is not needed where this one is not shifted
    state = (low >> shift) | ((high << 1) << (31 - shift))
    return level(state & ((1 << STATE) - 1), ASM)


@triton.jit
def trellis_tile(x, turned, stream, firsts, items, fixes, steps, left, right, t, tslab, slab, counters, y, M, N, RANK,
                 ITEMS, BM: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, BITS: tl.constexpr,
                 STATE: tl.constexpr, RK: tl.constexpr, RB: tl.constexpr, KS: tl.constexpr, PRODUCERS: tl.constexpr,
                 BK: tl.constexpr, SK: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr,
                 UNITS: tl.constexpr, F32: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Up to ``BM`` tokens: a unit of rows and ``STEPS`` times ``BK`` columns, levels rounded to the dtype of x.

    Besides ``SK`` programs a unit there is one an item of fixes, which reads x as ``turned`` (in_features, M), where
    the tokens of a column lie together; the last of a unit to arrive adds all in order.
    """
    pid = tl.program_id(0)
    R: tl.constexpr = 32 if BITS == 3 else 16
    if pid < PRODUCERS:
        produce_tile(x, right, t, tslab, counters, counters + 2, pid, M, BM, K, RANK, RK, RB, KS, False, F32, PDL)
    else:
        item = pid - PRODUCERS
        unit = (item - ITEMS) // SK
        split = (item - ITEMS) % SK
        r = tl.arange(0, R)
        m = tl.arange(0, BM)[:, None]
        acc = tl.zeros((BM, R), tl.float32)
        if item < ITEMS:
            unit, begin, last = item_of(items, firsts, item, UNITS, EACH)
            each = begin + tl.arange(0, EACH)
            grid_wait(PDL)
            which, column, difference = fix_of(fixes, tl.minimum(each, last - 1), last, R)
            here = (which[:, None] == r[None, :]) & (each < last)[:, None]
            b = tl.where(here, difference[:, None], 0.0).to(x.dtype.element_ty)
            a = tl.load(turned + column[:, None] * M + tl.minimum(tl.arange(0, BM), M - 1)[None, :])
            acc = dot(tl.trans(a), b, acc, F32)
        else:
            start = m.to(tl.int64) * K
            grid_wait(PDL)
            for step in tl.range(split * STEPS, tl.minimum((split + 1) * STEPS, (K + BK - 1) // BK), num_stages=STAGES):
                column = step * BK + tl.arange(0, BK)
                a = tl.load(x + start + column[None, :], mask=(m < M) & (column < K)[None, :], other=0.0)
                inside = tl.minimum(column, K - 1)[:, None]
                b = levels_at(stream, unit, r[None, :], inside, LINES, BITS, STATE, ASM)
                acc = dot(a, b.to(a.dtype), acc, F32)
        row = unit * R + r
        safe = tl.minimum(row, N - 1)
        acc *= tl.load(steps + safe)[None, :]
        if item >= ITEMS:
            if PRODUCERS > 0:
                if split == 0:
                    fine = handed_over(counters, PRODUCERS // KS, UNITS)
                    for r0 in tl.static_range(0, RK, RB):
                        rank = r0 + tl.arange(0, RB)
                        b = tl.load(left + safe.to(tl.int64)[None, :] * RANK + rank[:, None],
                                    mask=(rank < RANK)[:, None], other=0.0)  # fmt: skip
                        a = tl.load(t + m * RK + rank[None, :], volatile=True)
                        acc = dot_apart(a, b.to(a.dtype), acc, F32)
                    acc = tl.where(fine, acc, float("nan"))
        SIZE: tl.constexpr = BM * R
        place = m * R + r[None, :]
        slot = tl.where(item < ITEMS, item, ITEMS + unit * SK + split).to(tl.int64)
        tl.store(slab + slot * SIZE + place, acc)
        begin = tl.load(firsts + (UNITS + 1) + unit)
        last = tl.load(firsts + (UNITS + 1) + unit + 1)
        if publish(counters + 2 + PRODUCERS // KS + unit) == SK + (last - begin) - 1:
            acc = tl.zeros((BM, R), tl.float32)
            for each in tl.static_range(SK):
                acc += tl.load(slab + (ITEMS + unit * SK + each).to(tl.int64) * SIZE + place, volatile=True)
            several = tl.arange(0, 4)[:, None, None]
            for at in tl.range(begin, last, 4):
                found = slab + (at + several).to(tl.int64) * SIZE + place[None, :, :]
                acc += tl.sum(tl.load(found, mask=at + several < last, other=0.0, volatile=True), 0)
            inside = (m < M) & (row < N)[None, :]
            tl.store(y + m.to(tl.int64) * N + row[None, :], acc.to(y.dtype.element_ty), mask=inside)
            tl.atomic_xchg(counters + 2 + PRODUCERS // KS + unit, 0, sem="relaxed")


@triton.jit
def rebuild_trellis(stream, steps, weight, N, K: tl.constexpr, LINES: tl.constexpr, BITS: tl.constexpr,
                    STATE: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A unit of rows and ``BK`` columns of the weight, as the words show them, rounded once."""
    R: tl.constexpr = 32 if BITS == 3 else 16
    unit = tl.program_id(0)
    r = tl.arange(0, R)[:, None]
    row = unit * R + r
    column = tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    grid_wait(PDL)
    value = levels_at(stream, unit, r, tl.minimum(column, K - 1), LINES, BITS, STATE, ASM)
    value *= tl.load(steps + tl.minimum(row, N - 1))
    tl.store(weight + row.to(tl.int64) * K + column, value.to(weight.dtype.element_ty), mask=(row < N) & (column < K))


@triton.jit
def fix_trellis(stream, firsts, items, fixes, steps, weight, N, K: tl.constexpr, LINES: tl.constexpr,
                BITS: tl.constexpr, STATE: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, ASM: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """Write the entries of an item of fixes again."""
    R: tl.constexpr = 32 if BITS == 3 else 16
    unit, begin, last = item_of(items, firsts, tl.program_id(0), UNITS, EACH)
    each = begin + tl.arange(0, EACH)
    r, column, difference = fix_of(fixes, each, last, R)
    row = unit * R + r
    value = levels_at(stream, unit, r, column, LINES, BITS, STATE, ASM) + difference
    value *= tl.load(steps + tl.minimum(row, N - 1))
    grid_wait(PDL)
    tl.store(weight + row.to(tl.int64) * K + column, value.to(weight.dtype.element_ty), mask=(each < last) & (row < N))
