"""Device code of ``y = W x`` for a two-core MPO in one launch; the intermediate stays on the chip."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, grid_wait, publish


@triton.jit
def mpo2(x, first, second, slab, counters, y, M, O1, O2, I1, I2, D, O1P: tl.constexpr, I1P: tl.constexpr,
         I2P: tl.constexpr, OB: tl.constexpr, BM: tl.constexpr, SD: tl.constexpr, DS: tl.constexpr,
         F32: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``y[o1, o2] = sum_d sum_i1 first[d, i1, o1] (sum_i2 second[d, o2, i2] x[i1, i2])`` for ``BM`` tokens.

    A program takes ``OB`` values of o2 and ``SD`` of the bond; the product (o2, i2) (i2, i1) goes, rounded once,
    into the second product (o2, i1) (i1, o1). The ``DS`` bond slices are added in order by the last to arrive.
    """
    pid = tl.program_id(0)
    slice = pid % DS
    block = pid // DS
    blocks = tl.cdiv(O2, OB)
    o2 = (block % blocks) * OB + tl.arange(0, OB)
    token = (block // blocks) * BM
    o1 = tl.arange(0, O1P)
    i1 = tl.arange(0, I1P)
    i2 = tl.arange(0, I2P)
    N = tl.cast(O1, tl.int64) * O2
    grid_wait(PDL)
    inside = (i2 < I2)[:, None] & (i1 < I1)[None, :]
    at = x + token.to(tl.int64) * (I1 * I2) + i1[None, :] * I2 + i2[:, None]
    x0 = tl.load(at, mask=inside, other=0.0)
    x1 = x0
    if BM == 2:
        x1 = tl.load(at + I1 * I2, mask=inside & (token + 1 + 0 * i2 < M)[:, None], other=0.0)
    acc0 = tl.zeros((OB, O1P), tl.float32)
    acc1 = tl.zeros((OB, O1P), tl.float32)
    for d in tl.range(slice * SD, tl.minimum((slice + 1) * SD, D)):
        b = tl.load(
            second + (d * O2 + o2[:, None]) * I2 + i2[None, :], mask=(o2 < O2)[:, None] & (i2 < I2)[None, :], other=0.0
        )
        a = tl.load(
            first + (d * I1 + i1[:, None]) * O1 + o1[None, :], mask=(i1 < I1)[:, None] & (o1 < O1)[None, :], other=0.0
        )
        inner = dot(b, x0, tl.zeros((OB, I1P), tl.float32), F32)
        acc0 = dot(inner.to(a.dtype), a, acc0, F32)
        if BM == 2:
            inner = dot(b, x1, tl.zeros((OB, I1P), tl.float32), F32)
            acc1 = dot(inner.to(a.dtype), a, acc1, F32)
    place = token * N + o1[None, :].to(tl.int64) * O2 + o2[:, None]
    real = (o2 < O2)[:, None] & (o1 < O1)[None, :]
    # of a vector: newer interpreters make a comparison of two scalars an int32, which is no mask
    second_real = real & (token + 1 + 0 * o2 < M)[:, None]
    if DS == 1:
        tl.store(y + place, acc0.to(y.dtype.element_ty), mask=real)
        if BM == 2:
            tl.store(y + N + place, acc1.to(y.dtype.element_ty), mask=second_real)
    else:
        part = block.to(tl.int64) * (DS * BM * OB * O1P) + tl.arange(0, OB)[:, None] * O1P + o1[None, :]
        tl.store(slab + part + slice * (BM * OB * O1P), acc0)
        if BM == 2:
            tl.store(slab + part + (slice * BM + 1) * (OB * O1P), acc1)
        if publish(counters + block) == DS - 1:
            for m in tl.static_range(BM):
                acc = tl.zeros((OB, O1P), tl.float32)
                for each in tl.static_range(DS):
                    acc += tl.load(slab + part + (each * BM + m) * (OB * O1P), volatile=True)
                tl.store(y + m * N + place, acc.to(y.dtype.element_ty), mask=real & (token + m + 0 * o2 < M)[:, None])
            tl.atomic_xchg(counters + block, 0, sem="relaxed")
