"""Device code of grouped experts: tokens routed to tiles of one expert each, and ``dequant(Q_e) x + L_e (R_e x)``."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, dot_apart, grid_wait, handed_over, publish
from tnc.kernels.tile_unit import unit_product


@triton.jit
def expert_of(index, at, P, EXPERTS):
    """Experts of the pairs ``at``; ``EXPERTS`` for those that name none, and one more past the end."""
    e = tl.load(index + at, mask=at < P, other=0)
    e = tl.where((e < 0) | (e > EXPERTS), EXPERTS, e.to(tl.int32))
    return tl.where(at < P, e, EXPERTS + 1)


@triton.jit
def route(index, order, tiles, P, EXPERTS, TILES, BM, RANKED: tl.constexpr, PB: tl.constexpr, QB: tl.constexpr,
          EP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program 0 writes the tiles (expert, first and last position), the others the order of ``PB`` pairs each.

    The place of a pair is the number of pairs with a smaller (expert, pair): no program waits for another.
    """
    pid = tl.program_id(0)
    q = tl.arange(0, QB)
    grid_wait(PDL)
    if pid == 0:
        e = tl.arange(0, EP)
        count = tl.zeros((EP,), tl.int32)
        for q0 in tl.range(0, P, QB):
            count += tl.histogram(expert_of(index, q0 + q, P, EXPERTS), EP)
        count = tl.where(e <= EXPERTS, count, 0)
        many = (count + BM - 1) // BM
        place = tl.cumsum(many) - many
        start = tl.cumsum(count) - count
        for i in tl.range(0, tl.max(many)):
            inside = i < many
            tl.store(tiles + place + i, e, mask=inside)
            tl.store(tiles + TILES + place + i, start + i * BM, mask=inside)
            tl.store(tiles + 2 * TILES + place + i, start + tl.minimum((i + 1) * BM, count), mask=inside)
        total = tl.sum(many)
        for i in tl.range(total, TILES, EP):
            tl.store(tiles + i + e, -1 + 0 * e, mask=i + e < TILES)
    elif RANKED:
        p = (pid - 1) * PB + tl.arange(0, PB)
        key = expert_of(index, p, P, EXPERTS) * P + p
        rank = tl.zeros((PB,), tl.int32)
        for q0 in tl.range(0, P, QB):
            other = expert_of(index, q0 + q, P, EXPERTS) * P + q0 + q
            rank += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
        tl.store(order + rank, p, mask=p < P)


@triton.jit
def gathered(order, start, stop, BM: tl.constexpr):
    """Pairs (BM,) of a tile that is there, and which of them are real."""
    at = start + tl.arange(0, BM)
    return tl.load(order + tl.minimum(at, stop - 1)), at < stop


@triton.jit
def produce_gathered(x, right, t, slab, counters, row, real, part, BM: tl.constexpr, K: tl.constexpr, RANK,
                     RK: tl.constexpr, RB: tl.constexpr, KS: tl.constexpr, F32: tl.constexpr):  # fmt: skip
    """``RB`` ranks of one tile's t = R x and one of ``KS`` chunks of K; the last to arrive adds and publishes them."""
    block = part // KS
    chunk = part % KS
    m = tl.arange(0, BM)[:, None]
    rank = block * RB + tl.arange(0, RB)
    STEPS: tl.constexpr = ((K + 63) // 64 + KS - 1) // KS
    acc = tl.zeros((BM, RB), tl.float32)
    for step in range(chunk * STEPS, (chunk + 1) * STEPS):
        k = step * 64 + tl.arange(0, 64)
        a = tl.load(x + row.to(tl.int64)[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(right + rank.to(tl.int64)[None, :] * K + k[:, None],
                    mask=(rank < RANK)[None, :] & (k < K)[:, None], other=0.0)  # fmt: skip
        acc = dot(a, b.to(a.dtype), acc, F32)
    place = m * RK + rank[None, :]
    if KS > 1:
        tl.store(slab + chunk * (BM * RK) + place, acc)
        if publish(counters + 2 + block) == KS - 1:
            acc = tl.zeros((BM, RB), tl.float32)
            for each in tl.static_range(KS):
                acc += tl.load(slab + each * (BM * RK) + place, volatile=True)
            tl.atomic_xchg(counters + 2 + block, 0, sem="relaxed")
            tl.store(t + place, acc.to(t.dtype.element_ty))
            publish(counters)
    else:
        tl.store(t + place, acc.to(t.dtype.element_ty))
        publish(counters)


@triton.jit
def experts_tile(x, low, high, groups, left, right, firsts, gain, levels, order, tiles, t, tslab, slab, counters, y, P,
                 N, EXPERTS, TILES, SHARE, BM: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr,
                 GROUP: tl.constexpr, TABLE: tl.constexpr, LANES: tl.constexpr, GAIN: tl.constexpr, RK: tl.constexpr,
                 RB: tl.constexpr, KS: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, SK: tl.constexpr,
                 STAGES: tl.constexpr, F32: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A tile of at most ``BM`` pairs of one expert by tensor cores, pair p with row ``p // SHARE`` of x.

    The grid is as large as any routing may need; tiles that are not there end at once, pairs of no expert are zero.
    Low programs make t = R_e x of a tile and publish it; the last of the ``SK`` splits of a block of rows adds L_e t.
    """
    pid = tl.program_id(0)
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    RANKS: tl.constexpr = RK // RB
    producers = TILES * (RANKS * KS)
    blocks = tl.cdiv(N, BN)
    grid_wait(PDL)
    if pid < producers:
        tile = pid // (RANKS * KS)
        e = tl.load(tiles + tile)
        start = tl.load(tiles + TILES + tile)
        stop = tl.load(tiles + 2 * TILES + tile)
        if (e >= 0) & (e < EXPERTS):
            pair, real = gathered(order, start, stop, BM)
            begin = tl.load(firsts + e)
            rank = tl.load(firsts + e + 1) - begin
            produce_gathered(x, right + begin.to(tl.int64) * K, t + tile.to(tl.int64) * (BM * RK),
                             tslab + tile.to(tl.int64) * (KS * BM * RK), counters + tile * (2 + RANKS), pair // SHARE,
                             real, pid % (RANKS * KS), BM, K, rank, RK, RB, KS, F32)  # fmt: skip
    else:
        tile = (pid - producers) % TILES
        block = (pid - producers) // TILES // SK
        split = (pid - producers) // TILES % SK
        e = tl.load(tiles + tile)
        start = tl.load(tiles + TILES + tile)
        stop = tl.load(tiles + 2 * TILES + tile)
        if e >= 0:
            pair, real = gathered(order, start, stop, BM)
            column = block * BN + tl.arange(0, BN)
            safe = tl.minimum(column, N - 1)
            wide = tl.cast(N, tl.int64)
            inside = real[:, None] & (column < N)[None, :]
            place = pair.to(tl.int64)[:, None] * wide + column[None, :]
            if e == EXPERTS:
                if split == 0:
                    tl.store(y + place, tl.zeros((BM, BN), y.dtype.element_ty), mask=inside)
            else:
                row = (pair // SHARE).to(tl.int64)[:, None] * K
                acc = tl.zeros((BM, BN), tl.float32)
                own = low + e * (UNITS * wide * 32)
                tall = high + e * (UNITS * wide * 16)
                scales = groups + e * (GROUPS * wide)
                for unit in tl.range(split * STEPS, tl.minimum((split + 1) * STEPS, UNITS), num_stages=STAGES):
                    acc = unit_product(acc, x, row, real[:, None], own, tall, scales, levels, unit, wide, safe, BM, BN,
                                       K, BITS, SCALE, GROUP, TABLE, LANES, F32, ASM)  # fmt: skip
                if GAIN:
                    acc *= tl.load(gain + e)
                if RK > 0:
                    if split == SK - 1:
                        begin = tl.load(firsts + e)
                        rank = tl.load(firsts + e + 1) - begin
                        factor = left + begin * wide + safe.to(tl.int64)[None, :] * rank
                        r = tl.arange(0, RB)[:, None]
                        b = tl.load(factor + r, mask=r < rank, other=0.0)  # on its way while t is waited for
                        fine = handed_over(counters + tile * (2 + RANKS), RANKS, blocks)
                        inner = t + tile.to(tl.int64) * (BM * RK) + tl.arange(0, BM)[:, None] * RK
                        a = tl.load(inner + tl.arange(0, RB)[None, :], volatile=True)
                        acc = dot_apart(a, b.to(a.dtype), acc, F32)
                        for r0 in tl.static_range(RB, RK, RB):
                            b = tl.load(factor + r0 + r, mask=r0 + r < rank, other=0.0)
                            a = tl.load(inner + r0 + tl.arange(0, RB)[None, :], volatile=True)
                            acc = dot_apart(a, b.to(a.dtype), acc, F32)
                        acc = tl.where(fine, acc, float("nan"))
                if SK == 1:
                    tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
                else:
                    size = P * wide
                    part = slab + (start + tl.arange(0, BM)).to(tl.int64)[:, None] * wide + column[None, :]
                    tl.store(part + split * size, acc, mask=inside)
                    arrived = counters + TILES * (2 + RANKS) + tile * blocks + block
                    if publish(arrived) == SK - 1:
                        acc = tl.zeros((BM, BN), tl.float32)
                        for each in tl.static_range(SK):
                            acc += tl.load(part + each * size, mask=inside, other=0.0, volatile=True)
                        tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
                        tl.atomic_xchg(arrived, 0, sem="relaxed")


@triton.jit
def weighted_sum(y, weights, index, result, N, EXPERTS, SHARE: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr):
    """Result (tokens, N): the sum over a token's pairs of weight times row; pairs of no expert count for nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    grid_wait(PDL)
    for k in tl.static_range(SHARE):
        pair = token * SHARE + k
        e = tl.load(index + pair)
        weight = tl.load(weights + pair).to(tl.float32)
        part = tl.load(y + pair * N + column, mask=column < N, other=0.0).to(tl.float32)
        acc += tl.where((e >= 0) & (e < EXPERTS), weight * part, 0.0)
    tl.store(result + token * N + column, acc.to(result.dtype.element_ty), mask=column < N)
