"""Device code of trellis-coded weights for more tokens: a tile by tensor cores, and the weight written once."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, dot_apart, grid_wait, handed_over, publish
from tnc.kernels.factor_kernels import produce_tile
from tnc.kernels.trellis_kernels import fix_of, item_of, level


@triton.jit
def place_of(r, BITS: tl.constexpr):
    """Word of a line that the code of row r ends in, and the bits below it there."""
    end = BITS * (r + 1)
    plane = (end - 1) // 32
    return plane, 32 * (plane + 1) - end


@triton.jit
def words_at(stream, unit, r, column, LINES: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr):
    """The words that show the states in rows r of units and columns, and those before them; shapes broadcast."""
    PLANES: tl.constexpr = 1 if BITS == 2 else (3 if BITS == 3 else 2)
    R: tl.constexpr = 32 * PLANES // BITS
    plane, shift = place_of(r, BITS)
    base = stream + (unit.to(tl.int64) * PLANES + 1) * LINES
    before = base + ((plane - 1) * LINES + r + tl.where(plane == 0, R, 0)) + column
    return tl.load(base + (plane * LINES + r) + column), tl.load(before, mask=shift + STATE > 32, other=0)


@triton.jit
def levels_of(low, high, r, BITS: tl.constexpr, STATE: tl.constexpr, ASM: tl.constexpr):
    """float32 levels of rows r out of `words_at`."""
    _, shift = place_of(r, BITS)
    # 31 at most a shift: the word before is not needed where this one is not shifted
    state = (low.to(tl.uint32, bitcast=True) >> shift) | ((high.to(tl.uint32, bitcast=True) << 1) << (31 - shift))
    return level(state & ((1 << STATE) - 1), ASM)


@triton.jit
def levels_at(stream, unit, r, column, LINES: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr,
              ASM: tl.constexpr):  # fmt: skip
    """float32 levels of the entries in rows r of units and columns, as the words show them; shapes broadcast."""
    low, high = words_at(stream, unit, r, column, LINES, BITS, STATE)
    return levels_of(low, high, r, BITS, STATE, ASM)


@triton.jit
def inputs_at(x, m, column, M, K: tl.constexpr, BK: tl.constexpr):
    """``BK`` columns of x."""
    place = x + m.to(tl.int64) * K + column[None, :]
    if K % BK == 0:
        return tl.load(place, mask=m < M, other=0.0)
    else:
        return tl.load(place, mask=(m < M) & (column < K)[None, :], other=0.0)


@triton.jit
def turn(x, turned, pid, M, BM: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, flag, PDL: tl.constexpr):
    """``BK`` columns of x (M, K) as rows of ``turned`` (K, BM), published."""
    m = tl.arange(0, BM)
    column = pid * BK + tl.arange(0, BK)
    grid_wait(PDL)
    a = tl.load(x + m[:, None].to(tl.int64) * K + column[None, :], mask=(m < M)[:, None] & (column < K)[None, :],
                other=0.0)  # fmt: skip
    tl.store(turned + column[:, None] * BM + m[None, :], tl.trans(a), mask=(column < K)[:, None])
    publish(flag)


@triton.jit
def fixed_tile(turned, fixes, begin, last, BM: tl.constexpr, R: tl.constexpr, SOME: tl.constexpr, F32: tl.constexpr):
    """What the fixes from ``begin`` to ``last`` of a unit add, (BM, R)."""
    m = tl.arange(0, BM)[None, :]
    acc = tl.zeros((BM, R), tl.float32)
    for at in tl.range(begin, last, SOME, num_stages=1):
        each = at + tl.arange(0, SOME)
        which, column, difference = fix_of(fixes, tl.minimum(each, last - 1), last, R)
        here = (which[:, None] == tl.arange(0, R)[None, :]) & (each < last)[:, None]
        a = tl.load(turned + column[:, None] * BM + m, volatile=True)
        b = tl.where(here, difference[:, None], 0.0).to(a.dtype)
        acc = dot(tl.trans(a), b, acc, F32)
    return acc


@triton.jit
def trellis_tile(x, turned, stream, firsts, items, fixes, steps, left, right, t, tslab, slab, counters, y, M, N, RANK,
                 ITEMS, TURNS, BM: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, BITS: tl.constexpr,
                 STATE: tl.constexpr, RK: tl.constexpr, RB: tl.constexpr, KS: tl.constexpr, PRODUCERS: tl.constexpr,
                 BK: tl.constexpr, SK: tl.constexpr, STEPS: tl.constexpr, MANY: tl.constexpr, SOME: tl.constexpr,
                 SEVERAL: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, F32: tl.constexpr,
                 ASM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Up to ``BM`` tokens: ``MANY`` units of rows and ``STEPS`` times ``BK`` columns, levels in the dtype of x.

    Besides ``SK`` programs a block of units there is one an item of fixes, which reads x as ``turned`` (in_features,
    BM), where the tokens of a column lie together, ``SOME`` at a time: ``TURNS`` programs turn it. The last of a block
    to arrive adds all in order, ``SEVERAL`` items at a time.
    """
    pid = tl.program_id(0)
    R: tl.constexpr = 32 if BITS == 3 else 16
    BN: tl.constexpr = MANY * R
    BLOCKS: tl.constexpr = (UNITS + MANY - 1) // MANY
    arrivals = counters + 4 + PRODUCERS // KS
    if pid < TURNS:
        turn(x, turned, pid, M, BM, K, 256, counters + 2, PDL)
    elif pid < TURNS + PRODUCERS:
        produce_tile(x, right, t, tslab, counters, counters + 4, pid - TURNS, M, BM, K, RANK, RK, RB, KS, False, F32,
                     PDL)  # fmt: skip
    else:
        item = pid - TURNS - PRODUCERS
        block = (item - ITEMS) // SK
        m = tl.arange(0, BM)[:, None]
        if item < ITEMS:
            unit, begin, last = item_of(items, firsts, item, UNITS, EACH)
            block = unit // MANY
            within = tl.arange(0, R)[None, :]
            grid_wait(PDL)
            fine = handed_over(counters + 2, TURNS, ITEMS)
            added = fixed_tile(turned, fixes, begin, last, BM, R, SOME, F32)
            added = tl.where(fine, added * tl.load(steps + tl.minimum(unit * R + within, N - 1)), float("nan"))
            tl.store(slab + (item.to(tl.int64) * BM + m) * R + within, added)
        else:
            split = (item - ITEMS) % SK
            safe = tl.minimum(block * BN + tl.arange(0, BN), N - 1)
            units = tl.minimum(block * MANY + tl.arange(0, MANY), UNITS - 1)[None, :, None]
            r = 2 * tl.arange(0, R // 2)[None, None, :]
            end = tl.minimum((split + 1) * STEPS, (K + BK - 1) // BK)
            acc = tl.zeros((BM, BN), tl.float32)
            grid_wait(PDL)
            column = split * STEPS * BK + tl.arange(0, BK)
            inside = tl.minimum(column, K - 1)[:, None, None]
            low0, high0 = words_at(stream, units, r, inside, LINES, BITS, STATE)
            low1, high1 = words_at(stream, units, r + 1, inside, LINES, BITS, STATE)
            a = inputs_at(x, m, column, M, K, BK)
            for step in tl.range(split * STEPS, end, num_stages=1):
                column = tl.minimum(step + 1, end - 1) * BK + tl.arange(0, BK)  # on their way meanwhile
                inside = (column if K % BK == 0 else tl.minimum(column, K - 1))[:, None, None]
                next0, before0 = words_at(stream, units, r, inside, LINES, BITS, STATE)
                next1, before1 = words_at(stream, units, r + 1, inside, LINES, BITS, STATE)
                after = inputs_at(x, m, column, M, K, BK)
                even = levels_of(low0, high0, r, BITS, STATE, ASM)
                odd = levels_of(low1, high1, r + 1, BITS, STATE, ASM)
                acc = dot(a, tl.reshape(tl.join(even, odd), (BK, BN)).to(a.dtype), acc, F32)
                low0, high0, low1, high1, a = next0, before0, next1, before1, after
            acc *= tl.load(steps + safe)[None, :]
            if PRODUCERS > 0:
                if split == 0:
                    fine = handed_over(counters, PRODUCERS // KS, BLOCKS)
                    for r0 in tl.static_range(0, RK, RB):
                        rank = r0 + tl.arange(0, RB)
                        factor = tl.load(left + safe.to(tl.int64)[None, :] * RANK + rank[:, None],
                                         mask=(rank < RANK)[:, None], other=0.0)  # fmt: skip
                        inner = tl.load(t + m * RK + rank[None, :], volatile=True)
                        acc = dot_apart(inner, factor.to(inner.dtype), acc, F32)
                    acc = tl.where(fine, acc, float("nan"))
            parts = slab + tl.cast(ITEMS, tl.int64) * (BM * R)
            tl.store(parts + ((block * SK + split).to(tl.int64) * BM + m) * BN + tl.arange(0, BN)[None, :], acc)
        # the items of a column's unit, and of all units of the block
        row = block * BN + tl.arange(0, BN)
        first = firsts + (UNITS + 1) + tl.minimum(row // R, UNITS - 1)
        begin = tl.load(first)
        last = tl.load(first + 1)
        total = tl.load(firsts + (UNITS + 1) + tl.minimum((block + 1) * MANY, UNITS))
        total -= tl.load(firsts + (UNITS + 1) + block * MANY)
        if publish(arrivals + block) == SK + total - 1:
            acc = tl.zeros((BM, BN), tl.float32)
            parts = slab + tl.cast(ITEMS, tl.int64) * (BM * R)
            for each in tl.static_range(SK):
                place = ((block * SK + each).to(tl.int64) * BM + m) * BN + tl.arange(0, BN)[None, :]
                acc += tl.load(parts + place, volatile=True)
            several = tl.arange(0, SEVERAL)[:, None, None]
            for at in tl.range(0, tl.max(last - begin, 0), SEVERAL, num_stages=1):
                number = begin[None, None, :] + at + several
                found = slab + (number.to(tl.int64) * BM + m[None, :, :]) * R + (row % R)[None, None, :]
                acc += tl.sum(tl.load(found, mask=number < last[None, None, :], other=0.0, volatile=True), 0)
            inside = (m < M) & (row < N)[None, :]
            tl.store(y + m.to(tl.int64) * N + row[None, :], acc.to(y.dtype.element_ty), mask=inside)
            tl.atomic_xchg(arrivals + block, 0, sem="relaxed")


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
    grid_wait(PDL)
    for at in tl.range(begin, last, EACH):
        each = at + tl.arange(0, EACH)
        r, column, difference = fix_of(fixes, each, last, R)
        row = unit * R + r
        value = levels_at(stream, unit, r, column, LINES, BITS, STATE, ASM) + difference
        value *= tl.load(steps + tl.minimum(row, N - 1))
        place = weight + row.to(tl.int64) * K + column
        tl.store(place, value.to(weight.dtype.element_ty), mask=(each < last) & (row < N))
