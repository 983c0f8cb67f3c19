"""Device code of ``y = W x`` for a three-core MPO in one launch; both intermediates stay on the chip."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, grid_wait, publish


@triton.jit
def second_core(second, o2, i2, O2, I2, A, B, AP: tl.constexpr, BP: tl.constexpr, OB: tl.constexpr,
                IC: tl.constexpr):  # fmt: skip
    """The second core as ((i2, b), (o2, a)) for ``OB`` values of o2 and ``IC`` of i2."""
    k = tl.arange(0, IC * BP)
    n = tl.arange(0, OB * AP)
    row, b = i2 + k // BP, k % BP
    out, a = o2 + n // AP, n % AP
    inside = ((row < I2) & (b < B))[:, None] & ((out < O2) & (a < A))[None, :]
    return tl.load(second + ((a * O2 + out)[None, :] * I2 + row[:, None]) * B + b[:, None], mask=inside, other=0.0)


@triton.jit
def mpo3(x, first, second, third, slab, counters, y, M, O1, O2, O3, I1, I2, I3, A, B, O1P: tl.constexpr,
         O3P: tl.constexpr, I3P: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr, OB: tl.constexpr, BM: tl.constexpr,
         IC: tl.constexpr, ONCE: tl.constexpr, SI: tl.constexpr, DS: tl.constexpr, STAGES: tl.constexpr,
         F32: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``y[o1, o2, o3] = sum first[o1, i1, a] second[a, o2, i2, b] third[b, o3, i3] x[i1, i2, i3]`` for ``BM`` tokens.

    A program takes ``OB`` values of o2 and ``SI`` of i1. For each i1, and ``IC`` values of i2 at a time (all of them
    where ``ONCE``), a product with the third core over i3 and one with the second over (i2, b), both rounded once; then
    one with the first over a. The ``DS`` slices of i1 are added in order by the last to arrive.
    """
    pid = tl.program_id(0)
    slice = pid % DS
    block = pid // DS
    blocks = tl.cdiv(O2, OB)
    o2 = (block % blocks) * OB
    token = (block // blocks) * BM
    wide = tl.cast(I1, tl.int64) * I2 * I3
    row = tl.arange(0, BM * IC)  # (token, i2)
    c = tl.arange(0, O3P * BP)  # (o3, b)
    i3 = tl.arange(0, I3P)
    o1 = tl.arange(0, O1P)
    a = tl.arange(0, AP)
    w3 = tl.load(third + ((c % BP) * O3 + c // BP)[None, :] * I3 + i3[:, None],
                 mask=((c % BP < B) & (c // BP < O3))[None, :] & (i3 < I3)[:, None], other=0.0)  # fmt: skip
    if ONCE:
        w2 = second_core(second, o2, 0, O2, I2, A, B, AP, BP, OB, IC)
    grid_wait(PDL)
    at = x + (token + row // IC)[:, None] * wide + i3[None, :]
    real = ((token + row // IC) < M)[:, None] & (i3 < I3)[None, :]
    acc = tl.zeros((BM * O3P * OB, O1P), tl.float32)
    for i1 in tl.range(slice * SI, tl.minimum((slice + 1) * SI, I1)):
        w1 = tl.load(first + (o1[None, :] * I1 + i1) * A + a[:, None], mask=(a < A)[:, None] & (o1 < O1)[None, :],
                     other=0.0)  # fmt: skip
        outer = tl.zeros((BM * O3P, OB * AP), tl.float32)
        for i2 in tl.range(0, I2, IC, num_stages=STAGES):
            j = i2 + row % IC
            v = tl.load(at + ((i1 * I2 + j) * I3)[:, None], mask=real & (j < I2)[:, None], other=0.0)
            if not ONCE:
                w2 = second_core(second, o2, i2, O2, I2, A, B, AP, BP, OB, IC)
            inner = dot(v, w3, tl.zeros((BM * IC, O3P * BP), tl.float32), F32).to(v.dtype)
            inner = tl.permute(tl.reshape(inner, (BM, IC, O3P, BP)), (0, 2, 1, 3))
            outer = dot(tl.reshape(inner, (BM * O3P, IC * BP)), w2, outer, F32)
        acc = dot(tl.reshape(outer.to(w1.dtype), (BM * O3P * OB, AP)), w1, acc, F32)
    r = tl.arange(0, BM * O3P * OB)  # (token, o3, o2)
    t = r // (O3P * OB)
    o3 = r // OB % O3P
    out = o2 + r % OB
    place = ((token + t).to(tl.int64) * (O1 * O2 * O3) + out * O3 + o3)[:, None] + (o1 * (O2 * O3))[None, :]
    inside = ((token + t < M) & (o3 < O3) & (out < O2))[:, None] & (o1 < O1)[None, :]
    if DS == 1:
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
    else:
        size = BM * O3P * OB * O1P
        part = slab + block.to(tl.int64) * (DS * size) + r[:, None] * O1P + o1[None, :]
        tl.store(part + slice * size, acc)
        if publish(counters + block) == DS - 1:
            acc = tl.zeros((BM * O3P * OB, O1P), tl.float32)
            for each in tl.static_range(DS):
                acc += tl.load(part + each * size, volatile=True)
            tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
            tl.atomic_xchg(counters + block, 0, sem="relaxed")
