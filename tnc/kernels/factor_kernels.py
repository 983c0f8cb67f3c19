"""Device code of the low-rank term: producers make ``t = R x``, and rows of ``L t``."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, grid_wait, publish


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
def operands(x, right, m, safe, step, M, K: tl.constexpr):
    """64 columns of x (BM, 64) and of the rows ``safe`` of R (64, RB), in the dtype of x."""
    k = step * 64 + tl.arange(0, 64)
    a = tl.load(x + m.to(tl.int64) * K + k[None, :], mask=(m < M) & (k < K)[None, :], other=0.0)
    b = tl.load(right + safe[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0.0)
    return a, b.to(a.dtype)


@triton.jit
def produce_tile(x, right, t, slab, counters, arrivals, pid, M, BM: tl.constexpr, K: tl.constexpr, RANK,
                 RK: tl.constexpr, RB: tl.constexpr, KS: tl.constexpr, SEVERAL: tl.constexpr, F32: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """``RB`` ranks of t and one of ``KS`` chunks of K; the last chunk to arrive adds them and publishes t.

    ``SEVERAL``: the launch makes several t.
    """
    block = pid // KS
    chunk = pid % KS
    m = tl.arange(0, BM)[:, None]
    rank = block * RB + tl.arange(0, RB)
    safe = tl.minimum(rank, RANK - 1).to(tl.int64)
    STEPS: tl.constexpr = ((K + 63) // 64 + KS - 1) // KS
    acc = tl.zeros((BM, RB), tl.float32)
    grid_wait(PDL)
    # One product before the loop: ptxas 12.8 unrolls a short loop around wgmma and, if the sum begins as zeros, drops
    # the products (tests/kernels/test_machine_code.py).
    ALONE: tl.constexpr = 1 if STEPS == 1 or (SEVERAL and BM >= 64) else 0
    if ALONE:
        a, b = operands(x, right, m, safe, chunk * STEPS, M, K)
        acc = dot(a, b, acc, F32)
    if STEPS > ALONE:
        for step in range(chunk * STEPS + ALONE, (chunk + 1) * STEPS):
            a, b = operands(x, right, m, safe, step, M, K)
            acc = dot(a, b, acc, F32)
    acc = tl.where((rank < RANK)[None, :], acc, 0.0)
    if KS > 1:
        tl.store(slab + (chunk * BM + m) * RK + rank[None, :], acc)
        if publish(arrivals + block) == KS - 1:
            acc = tl.zeros((BM, RB), tl.float32)
            for each in tl.static_range(KS):
                acc += tl.load(slab + (each * BM + m) * RK + rank[None, :], volatile=True)
            tl.atomic_xchg(arrivals + block, 0, sem="relaxed")
            tl.store(t + m * RK + rank[None, :], acc.to(t.dtype.element_ty))
            publish(counters)
    else:
        tl.store(t + m * RK + rank[None, :], acc.to(t.dtype.element_ty))
        publish(counters)


@triton.jit
def first_of_t(t, ranks, RK: tl.constexpr, M: tl.constexpr):
    """The entries ``ranks`` of t for one or two tokens (zero for a token that is not there)."""
    t0 = tl.load(t + ranks, volatile=True)
    t1 = tl.zeros_like(t0)
    if M == 2:
        t1 = tl.load(t + RK + ranks, volatile=True)
    return t0, t1


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
