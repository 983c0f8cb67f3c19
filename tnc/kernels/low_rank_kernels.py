"""Device code of ``y = L (R x)`` in one launch: producers make t = R x while consumers fetch L."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot_apart, grid_wait, handed_over
from tnc.kernels.factor_kernels import first_of_t, left_rows, left_vector, produce_tile, produce_vector


@triton.jit
def low_rank_vector(x, left, right, t, counters, y, N, RANK, M: tl.constexpr, K: tl.constexpr, RK: tl.constexpr,
                    RB: tl.constexpr, KC: tl.constexpr, PRODUCERS: tl.constexpr, BN: tl.constexpr, RC: tl.constexpr,
                    STRIDE, LOOP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One or two tokens by float32 FMA; ``RC`` columns of the next ``BN`` rows of L are always on their way."""
    pid = tl.program_id(0)
    if pid < PRODUCERS:
        produce_vector(x, right, t, counters, pid, M, K, RANK, RK, RB, KC, PDL)
    else:
        start = pid - PRODUCERS
        blocks = tl.cdiv(N, BN)
        first = left_rows(left, tl.minimum(start * BN + tl.arange(0, BN), N - 1), 0, RANK, RC)
        grid_wait(PDL)
        fine = True
        ranks = tl.arange(0, RC)[None, :]
        t0 = tl.zeros((1, RC), tl.float32)
        t1 = tl.zeros((1, RC), tl.float32)
        for block in tl.range(start, blocks, STRIDE):
            row = block * BN + tl.arange(0, BN)
            safe = tl.minimum(row, N - 1)
            if LOOP:
                after = tl.minimum(block + STRIDE, blocks - 1)
                first_next = left_rows(left, tl.minimum(after * BN + tl.arange(0, BN), N - 1), 0, RANK, RC)
            if block == start:
                fine = handed_over(counters, PRODUCERS, STRIDE)
                t0, t1 = first_of_t(t, ranks, RK, M)
            y0 = tl.where(fine, left_vector(first, t0, left, t, safe, RANK, RK, RC), float("nan"))
            tl.store(y + row, y0.to(y.dtype.element_ty), mask=row < N)
            if M == 2:
                y1 = tl.where(fine, left_vector(first, t1, left, t + RK, safe, RANK, RK, RC), float("nan"))
                tl.store(y + N + row, y1.to(y.dtype.element_ty), mask=row < N)
            if LOOP:
                first = first_next


@triton.jit
def low_rank_tile(x, left, right, t, tslab, counters, y, M, N, RANK, BM: tl.constexpr, K: tl.constexpr,
                  RK: tl.constexpr, RB: tl.constexpr, KS: tl.constexpr, PRODUCERS: tl.constexpr, BN: tl.constexpr,
                  RC: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Up to ``BM`` tokens by tensor cores; t is rounded once to the dtype of x."""
    pid = tl.program_id(0)
    if pid < PRODUCERS:
        produce_tile(x, right, t, tslab, counters, counters + 2, pid, M, BM, K, RANK, RK, RB, KS, False, F32, PDL)
    else:
        column = (pid - PRODUCERS) * BN + tl.arange(0, BN)
        safe = tl.minimum(column, N - 1)
        m = tl.arange(0, BM)[:, None]
        r = tl.arange(0, RC)
        acc = tl.zeros((BM, BN), tl.float32)
        b = tl.trans(left_rows(left, safe, 0, RANK, RC))
        fine = handed_over(counters, PRODUCERS // KS, tl.cdiv(N, BN))
        a = tl.load(t + m * RK + r[None, :], volatile=True)
        acc = dot_apart(a, b.to(a.dtype), acc, F32)
        for r0 in tl.static_range(RC, RK, RC):
            b = tl.trans(left_rows(left, safe, r0, RANK, RC))
            a = tl.load(t + m * RK + r0 + r[None, :], volatile=True)
            acc = dot_apart(a, b.to(a.dtype), acc, F32)
        inside = (m < M) & (column < N)[None, :]
        place = m * tl.cast(N, tl.int64) + column[None, :]
        tl.store(y + place, tl.where(fine, acc, float("nan")).to(y.dtype.element_ty), mask=inside)
