"""Device code of trellis-coded weights: states out of words, their levels, and products with one or two tokens.

Levels are whole numbers here, the sum of four bytes less 510; the scale of a row takes the rest. The states that words
show are wrong in the first rows of a sequence, whose codes lie at its end: *fixes* hold by how much their levels are
(`tnc.kernels.trellis_fixes`), so that no code has to look where a sequence begins.
"""

# ruff: noqa: ANN001, ANN201, RUF005, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import grid_wait, handed_over, publish
from tnc.kernels.factor_kernels import first_of_t, left_rows, left_vector, produce_vector


@triton.jit
def level(state, ASM: tl.constexpr):
    """float32 level of uint32 states: a product, a sum of bytes as the mantissa of 2**23, a difference."""
    word = state * 34038481 + 76625530
    if ASM:
        code: tl.constexpr = (
            "{ .reg .b32 ones, base; mov.b32 ones, 0x01010101; mov.b32 base, 0x4B000000; "
            "dp4a.u32.u32 $0, $1, ones, base; }"
        )
        total = tl.inline_asm_elementwise(code, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
        return total.to(tl.float32, bitcast=True) - 8389118.0
    else:
        total = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)
        return total.to(tl.float32) - 510.0


@triton.jit
def window(words, r: tl.constexpr, line: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr):
    """States of row r of a unit; ``words`` are, line after line, the word before the unit and its planes."""
    PLANES: tl.constexpr = 1 if BITS == 2 else (3 if BITS == 3 else 2)
    END: tl.constexpr = BITS * (r + 1)
    PLANE: tl.constexpr = (END - 1) // 32
    SHIFT: tl.constexpr = 32 * (PLANE + 1) - END
    low = words[line * (PLANES + 1) + PLANE + 1]
    state = low >> SHIFT
    if SHIFT + STATE > 32:
        state |= words[line * (PLANES + 1) + PLANE] << (32 - SHIFT)
    return state & ((1 << STATE) - 1)


@triton.jit
def four(words):
    """The four columns of (lanes, 4) words."""
    even, odd = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def planes_of(own, line, R: tl.constexpr, PLANES: tl.constexpr, LINES: tl.constexpr):
    """(32, 4) words of the lines from ``line`` on: those before the unit, then its planes."""
    found = (tl.load(own + (line + R - LINES)),)
    for plane in tl.static_range(PLANES):
        found = found + (tl.load(own + (line + plane * LINES)),)
    return found


@triton.jit
def number(x, column, K: tl.constexpr):
    """Entries of x as float32, 0 outside."""
    return tl.load(x + column, mask=(column >= 0) & (column < K), other=0.0).to(tl.float32)


@triton.jit
def item_of(items, firsts, item, UNITS: tl.constexpr, EACH: tl.constexpr):
    """Unit of an item of fixes, its first fix, and the one after its last."""
    unit = tl.load(items + item)
    first = tl.load(firsts + unit)
    end = tl.load(firsts + unit + 1)
    number = tl.load(firsts + (UNITS + 1) + unit)
    count = tl.load(firsts + (UNITS + 1) + unit + 1) - number
    size = tl.cdiv(tl.cdiv(end - first, count), EACH) * EACH
    begin = first + size * (item - number)
    return unit, begin, tl.minimum(begin + size, end)


@triton.jit
def fix_of(fixes, at, last, R: tl.constexpr):
    """Row in the unit, column and difference of the level of fixes; 0 past the last."""
    ROW: tl.constexpr = 5 if R == 32 else 4
    word = tl.load(fixes + at, mask=at < last, other=0)
    return (word >> 16) & (R - 1), word & 0xFFFF, (word >> (16 + ROW)).to(tl.float32)


@triton.jit
def units(x, stream, unit, split, y0, y1, M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, BITS: tl.constexpr,
          STATE: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """``y0`` and ``y1`` (R,) plus the sums over a split of the lines of a unit."""
    PLANES: tl.constexpr = 1 if BITS == 2 else (3 if BITS == 3 else 2)
    R: tl.constexpr = 32 * PLANES // BITS
    lane = tl.arange(0, 32)
    total = ()
    for _ in tl.static_range(R * M):
        total = total + (tl.zeros((32,), tl.float32),)
    own = stream + (unit.to(tl.int64) * PLANES + 1) * LINES + 4 * lane[:, None] + tl.arange(0, 4)[None, :]
    end = tl.minimum((split + 1) * CHUNKS, (LINES + 127) // 128)
    held = planes_of(own, split * CHUNKS * 128, R, PLANES, LINES)
    for chunk in tl.range(split * CHUNKS, end):
        line = chunk * 128
        after = planes_of(own, tl.minimum(chunk + 1, end - 1) * 128, R, PLANES, LINES)  # on their way meanwhile
        planes = ()
        for plane in tl.static_range(PLANES + 1):
            planes = planes + (four(held[plane]),)
        words = ()
        for q in tl.static_range(4):
            for plane in tl.static_range(PLANES + 1):
                words = words + (planes[plane][q].to(tl.uint32, bitcast=True),)
        column = line + 4 * lane - (R - 1)
        xs = ()
        for m in tl.static_range(M):
            for k in tl.static_range(R + 3):
                xs = xs + (number(x + m * K, column + k, K),)
        sums = ()
        for r in tl.static_range(R):
            a0 = total[r * M]
            a1 = total[r * M + M - 1]
            for q in tl.static_range(4):
                value = level(window(words, r, q, BITS, STATE), ASM)
                a0 += value * xs[q + R - 1 - r]
                if M == 2:
                    a1 += value * xs[R + 3 + q + R - 1 - r]
            sums = sums + (a0,)
            if M == 2:
                sums = sums + (a1,)
        total = sums
        held = after
    for r in tl.static_range(R):
        mine = tl.arange(0, R) == r
        y0 += tl.where(mine, tl.sum(total[r * M], 0), 0.0)
        if M == 2:
            y1 += tl.where(mine, tl.sum(total[r * M + 1], 0), 0.0)
    return y0, y1


@triton.jit
def fixed(x, fixes, begin, last, y0, y1, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, EACH: tl.constexpr):
    """``y0`` and ``y1`` (R,) plus what an item of fixes adds for one or two tokens."""
    rows = tl.arange(0, R)
    for at in tl.range(begin, last, EACH):
        which, column, difference = fix_of(fixes, at + tl.arange(0, EACH), last, R)
        column = tl.where(at + tl.arange(0, EACH) < last, column, K)
        a0 = difference * number(x, column, K)
        a1 = a0
        if M == 2:
            a1 = difference * number(x + K, column, K)
        for r in tl.static_range(R):
            y0 += tl.where(rows == r, tl.sum(tl.where(which == r, a0, 0.0), 0), 0.0)
            if M == 2:
                y1 += tl.where(rows == r, tl.sum(tl.where(which == r, a1, 0.0), 0), 0.0)
    return y0, y1


@triton.jit
def trellis_vector(x, stream, firsts, items, fixes, steps, left, right, t, slab, counters, y, N, RANK, ITEMS,
                   M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr,
                   RK: tl.constexpr, RB: tl.constexpr, KC: tl.constexpr, PRODUCERS: tl.constexpr, SK: tl.constexpr,
                   CHUNKS: tl.constexpr, EACH: tl.constexpr, UNITS: tl.constexpr, ASM: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """One warp a program, one or two tokens: a unit of rows and ``CHUNKS`` times 128 lines, four a lane.

    Line l meets in row r the entry ``l - r`` of x, so a lane keeps those few that its four lines meet in registers.
    Besides ``SK`` programs a unit there is one an item of fixes; the last of a unit to arrive adds all in order.
    """
    pid = tl.program_id(0)
    PLANES: tl.constexpr = 1 if BITS == 2 else (3 if BITS == 3 else 2)
    R: tl.constexpr = 32 * PLANES // BITS
    RC: tl.constexpr = RK if RK <= 64 else 64
    if pid < PRODUCERS:
        produce_vector(x, right, t, counters, pid, M, K, RANK, RK, RB, KC, PDL)
    else:
        item = pid - PRODUCERS
        unit = (item - ITEMS) // SK
        split = (item - ITEMS) % SK
        rows = tl.arange(0, R)
        y0 = tl.zeros((R,), tl.float32)
        y1 = tl.zeros((R,), tl.float32)
        if item < ITEMS:
            unit, begin, last = item_of(items, firsts, item, UNITS, EACH)
            grid_wait(PDL)
            y0, y1 = fixed(x, fixes, begin, last, y0, y1, M, K, R, EACH)
        else:
            grid_wait(PDL)
            y0, y1 = units(x, stream, unit, split, y0, y1, M, K, LINES, BITS, STATE, CHUNKS, ASM)
        row = unit * R + rows
        safe = tl.minimum(row, N - 1)
        step = tl.load(steps + safe)
        y0 *= step
        y1 *= step
        if item >= ITEMS:
            if PRODUCERS > 0:
                if split == 0:
                    head = left_rows(left, safe, 0, RANK, RC)
                    fine = handed_over(counters, PRODUCERS, UNITS)
                    t0, t1 = first_of_t(t, tl.arange(0, RC)[None, :], RK, M)
                    y0 = tl.where(fine, y0 + left_vector(head, t0, left, t, safe, RANK, RK, RC), float("nan"))
                    if M == 2:
                        y1 = tl.where(fine, y1 + left_vector(head, t1, left, t + RK, safe, RANK, RK, RC), float("nan"))
        own = slab + tl.where(item < ITEMS, item * M, ITEMS * M + (unit * SK + split) * M) * R + rows
        tl.store(own, y0)
        if M == 2:
            tl.store(own + R, y1)
        begin = tl.load(firsts + (UNITS + 1) + unit)
        last = tl.load(firsts + (UNITS + 1) + unit + 1)
        if publish(counters + 2 + unit) == SK + (last - begin) - 1:
            several = tl.arange(0, 16)[:, None]
            for m in tl.static_range(M):
                found = tl.zeros((R,), tl.float32)
                for each in tl.static_range(SK):
                    found += tl.load(slab + ((ITEMS + unit * SK + each) * M + m) * R + rows, volatile=True)
                for at in tl.range(begin, last, 16):
                    place = ((at + several) * M + m) * R + rows[None, :]
                    found += tl.sum(tl.load(slab + place, mask=at + several < last, other=0.0, volatile=True), 0)
                tl.store(y + m * N + row, found.to(y.dtype.element_ty), mask=row < N)
            tl.atomic_xchg(counters + 2 + unit, 0, sem="relaxed")
