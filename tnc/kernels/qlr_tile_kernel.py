"""Device code of ``y = dequant(Q) x + L (R x)`` in one launch, up to 64 tokens by tensor cores."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.change_kernels import make
from tnc.kernels.decode import chosen, dot_apart, grid_wait, heard, member_of, publish
from tnc.kernels.factor_kernels import produce_tile
from tnc.kernels.tile_unit import unit_product


@triton.jit
def qlr_tile(x, made, change, ready, lows, highs, groups, lefts, rights, gains, levels, t, tslab, slab, counters,
             arrived, y, M, rows, ranks, firsts, tops, total, blocks, unity, BM: tl.constexpr, K: tl.constexpr,
             IN: tl.constexpr, FORM: tl.constexpr, MAKERS: tl.constexpr, APART: tl.constexpr, BITS: tl.constexpr,
             SCALE: tl.constexpr, GROUP: tl.constexpr, TABLE: tl.constexpr, LANES: tl.constexpr, GAIN: tl.constexpr,
             RK: tl.constexpr, RB: tl.constexpr, KS: tl.constexpr, PRODUCERS: tl.constexpr, BN: tl.constexpr,
             STEPS: tl.constexpr, SK: tl.constexpr, STAGES: tl.constexpr, F32: tl.constexpr, ASM: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """Up to ``BM`` tokens by tensor cores (`unit_product`).

    ``made``, ``MAKERS`` and ``APART`` as in `tnc.kernels.qlr_vector_kernel.qlr_vector`.
    """
    pid = tl.program_id(0) - MAKERS
    UNIT: tl.constexpr = 256 if BITS == 3 else 512 // BITS
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    RANKS: tl.constexpr = PRODUCERS // KS  # blocks of ranks of every t
    EACH: tl.constexpr = RK // RB * KS  # producers of one t
    LOW: tl.constexpr = MAKERS + (PRODUCERS if APART else 0)
    if pid < 0:
        if MAKERS > 0:
            make(x, made, change, ready, pid + MAKERS, MAKERS, LOW, IN, K, FORM, unity, F32, PDL)
    elif pid < PRODUCERS:
        slot = pid // EACH
        produce_tile(x if APART else made, chosen(rights, slot), t + slot * (BM * RK), tslab + slot * (KS * BM * RK),
                     counters, arrived + slot * (RK // RB), pid % EACH, M, BM, K, chosen(ranks, slot), RK, RB, KS,
                     PRODUCERS != EACH, F32, PDL, None if APART or MAKERS == 0 else ready, LOW, RANKS, blocks,
                     slot == 0)  # fmt: skip
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
        start = m.to(tl.int64) * K
        acc = tl.zeros((BM, BN), tl.float32)
        grid_wait(PDL)
        fine = True
        if MAKERS > 0:
            fine = heard(ready, pid + MAKERS, LOW, tl.num_programs(0))
        for unit in tl.range(split * STEPS, tl.minimum((split + 1) * STEPS, UNITS), num_stages=STAGES):
            acc = unit_product(acc, made, start, m < M, low, chosen(highs, which), scales, levels, unit, wide, safe, BM,
                               BN, K, BITS, SCALE, GROUP, TABLE, LANES, F32, ASM)  # fmt: skip
        if GAIN:
            acc *= tl.load(chosen(gains, which))
        if PRODUCERS > 0:
            if split == SK - 1:
                fine &= heard(counters, block, 0, blocks)
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
        if PRODUCERS > 0 or MAKERS > 0:
            acc = tl.where(fine, acc, float("nan"))
        top = chosen(tops, which)
        place = M * tl.cast(top, tl.int64) + m * wide + column[None, :]
        inside = (m < M) & (column < N)[None, :]
        if SK == 1:
            tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
        else:
            size = M * tl.cast(total, tl.int64)
            tl.store(slab + split * size + place, acc, mask=inside)
            if publish(arrived + RANKS + block) == SK - 1:
                acc = tl.zeros((BM, BN), tl.float32)
                for each in tl.static_range(SK):
                    acc += tl.load(slab + each * size + place, mask=inside, other=0.0, volatile=True)
                tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
                tl.atomic_xchg(arrived + RANKS + block, 0, sem="relaxed")
