"""Device code of the low-rank term: producers make ``t = R x``, and rows of ``L t``."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import announce, dot, entries, grid_wait, heard, publish


@triton.jit
def told(counters, first, makers, watchers):
    """Hand over what one of ``makers`` programs stored: to `heard` of so many ``watchers``, else to `handed_over`."""
    if watchers is None:
        publish(counters)
    else:
        announce(counters, first, makers, 0, watchers)


@triton.jit
def produce_vector(x, right, t, flag, pid, M: tl.constexpr, K: tl.constexpr, RANK, RK: tl.constexpr, RB: tl.constexpr,
                   KC: tl.constexpr, PDL: tl.constexpr, order=None, factor=None, IN: tl.constexpr = 0, ready=None,
                   low=0, makers=0, watchers=None, first=False, AHEAD: tl.constexpr = 0):  # fmt: skip
    """``RB`` rows of t = R x (M, RK) in float32, over all of K, handed over as `told` says.

    Entries of x as `entries` takes them, from rows of ``IN`` (0: of K); ``ready`` is the announcement of x, if it is
    made in this launch for the programs from ``low`` on. The first step of R is loaded before x is waited for, if it
    has at most ``AHEAD`` entries.
    """
    row = pid * RB + tl.arange(0, RB)
    start = tl.minimum(row, RANK - 1).to(tl.int64)[:, None] * K
    a0 = tl.zeros((RB,), tl.float32)
    a1 = tl.zeros((RB,), tl.float32)
    k = tl.arange(0, KC)[None, :]
    if RB * KC <= AHEAD:
        r = tl.load(right + start + k, mask=k < K, other=0.0)
    grid_wait(PDL)
    fine = True
    if ready is not None:
        fine = heard(ready, tl.program_id(0), low, tl.num_programs(0))
    second = x + (IN if IN > 0 else K)
    for k0 in tl.static_range(0, K, KC):
        k = k0 + tl.arange(0, KC)[None, :]
        if k0 > 0 or RB * KC > AHEAD:
            r = tl.load(right + start + k, mask=k < K, other=0.0)
        a0 += tl.sum(r.to(tl.float32) * entries(x, order, factor, k, k < K).to(tl.float32), 1)
        if M == 2:
            a1 += tl.sum(r.to(tl.float32) * entries(second, order, factor, k, k < K).to(tl.float32), 1)
    if ready is not None:
        a0 = tl.where(fine, a0, float("nan"))
        a1 = tl.where(fine, a1, float("nan"))
    tl.store(t + row, tl.where(row < RANK, a0, 0.0), mask=row < RK)
    if M == 2:
        tl.store(t + RK + row, tl.where(row < RANK, a1, 0.0), mask=row < RK)
    told(flag, first, makers, watchers)


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
                 PDL: tl.constexpr, ready=None, low=0, makers=0, watchers=None, first=False):  # fmt: skip
    """``RB`` ranks of t and one of ``KS`` chunks of K; the last chunk to arrive adds them and publishes t.

    ``SEVERAL``: the launch makes several t. ``ready`` as in `produce_vector`.
    """
    block = pid // KS
    chunk = pid % KS
    m = tl.arange(0, BM)[:, None]
    rank = block * RB + tl.arange(0, RB)
    safe = tl.minimum(rank, RANK - 1).to(tl.int64)
    STEPS: tl.constexpr = ((K + 63) // 64 + KS - 1) // KS
    acc = tl.zeros((BM, RB), tl.float32)
    grid_wait(PDL)
    fine = True
    if ready is not None:
        fine = heard(ready, tl.program_id(0), low, tl.num_programs(0))
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
    if ready is not None:
        acc = tl.where(fine, acc, float("nan"))
    if KS > 1:
        tl.store(slab + (chunk * BM + m) * RK + rank[None, :], acc)
        if publish(arrivals + block) == KS - 1:
            acc = tl.zeros((BM, RB), tl.float32)
            for each in tl.static_range(KS):
                acc += tl.load(slab + (each * BM + m) * RK + rank[None, :], volatile=True)
            tl.atomic_xchg(arrivals + block, 0, sem="relaxed")
            tl.store(t + m * RK + rank[None, :], acc.to(t.dtype.element_ty))
            told(counters, first & (block == 0), makers, watchers)
    else:
        tl.store(t + m * RK + rank[None, :], acc.to(t.dtype.element_ty))
        told(counters, first & (block == 0), makers, watchers)


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
