"""Device code of ``y = W x`` for a three-core MPO in one launch, its last two cores merged on the chip."""

# ruff: noqa: ANN001, ANN201, SIM102 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, grid_wait, publish


@triton.jit
def split_index(flat, N1: tl.constexpr, N2: tl.constexpr, N1P: tl.constexpr, N2P: tl.constexpr):
    """``i1 N2 + i2`` of padded flat indices ``i1 N2P + i2``; at least ``N1 N2`` where i1 or i2 is padding."""
    if N1 == N1P and N2 == N2P:  # said apart, so that neighbours are seen to be neighbours
        return flat
    else:
        there = (flat // N2P < N1) & (flat % N2P < N2)
        return tl.where(there, flat // N2P * N2 + flat % N2P, N1 * N2)


@triton.jit
def mpo3(x, first, second, third, slab, counters, y, M, O1, O2, O3: tl.constexpr, I1, I2: tl.constexpr,
         I3: tl.constexpr, A, B, O1P: tl.constexpr, O3P: tl.constexpr, I1P: tl.constexpr, I2P: tl.constexpr,
         I3P: tl.constexpr, BP: tl.constexpr, AB: tl.constexpr, BM: tl.constexpr, STEPS: tl.constexpr, DS: tl.constexpr,
         STAGES: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``y[o1, o2, o3] = sum first[o1, i1, a] second[a, o2, i2, b] third[b, o3, i3] x[i1, i2, i3]``.

    A program takes one o2 and ``AB`` values of a, merges its part of the second and third core over b into a matrix
    ((i2, i3), (a, o3)), rounded once, and keeps it. That meets ``BM`` tokens at a time as rows ((token, i1), (i2, i3)),
    ``STEPS`` times; the result, rounded, the first core over (i1, a). The ``DS`` slices of a are added in order by the
    last to arrive.
    """
    pid = tl.program_id(0)
    slice = pid % DS
    block = pid // DS
    o2 = block % O2
    token = (block // O2) * (BM * STEPS)
    wide = tl.cast(I1, tl.int64) * I2 * I3
    row = tl.arange(0, AB * I2P)  # (a, i2)
    b = tl.arange(0, BP)
    c = tl.arange(0, O3P * I3P)  # (o3, i3)
    a = slice * AB + row // I2P
    w2 = tl.load(second + (((a * O2 + o2) * I2 + row % I2P) * B)[:, None] + b[None, :],
                 mask=((a < A) & (row % I2P < I2))[:, None] & (b < B)[None, :], other=0.0)  # fmt: skip
    within = split_index(c, O3, I3, O3P, I3P)
    w3 = tl.load(third + b[:, None] * (O3 * I3) + within[None, :],
                 mask=(b < B)[:, None] & (within < O3 * I3)[None, :], other=0.0)  # fmt: skip
    k = tl.arange(0, I1P * AB)  # (i1, a)
    o1 = tl.arange(0, O1P)
    ka = slice * AB + k % AB
    w1 = tl.load(first + ((o1[None, :] * I1 + (k // AB)[:, None]) * A + ka[:, None]),
                 mask=((k // AB < I1) & (ka < A))[:, None] & (o1 < O1)[None, :], other=0.0)  # fmt: skip
    core = dot(w2, w3, tl.zeros((AB * I2P, O3P * I3P), tl.float32), F32).to(w2.dtype)
    core = tl.permute(tl.reshape(core, (AB, I2P, O3P, I3P)), (1, 3, 0, 2))
    core = tl.reshape(core, (I2P * I3P, AB * O3P))
    grid_wait(PDL)
    r = tl.arange(0, BM * I1P)  # (token, i1)
    j = split_index(tl.arange(0, I2P * I3P), I2, I3, I2P, I3P)
    at = (r % I1P)[:, None] * (I2 * I3) + j[None, :]
    real = (r % I1P < I1)[:, None] & (j < I2 * I3)[None, :]
    q = tl.arange(0, BM * O3P)  # (token, o3)
    place = (q % O3P)[:, None] + o2 * O3 + (o1 * (O2 * O3))[None, :]
    inside = (q % O3P < O3)[:, None] & (o1 < O1)[None, :]
    rows = tl.cast(O1, tl.int64) * O2 * O3
    size: tl.constexpr = BM * O3P * O1P
    part = slab + block.to(tl.int64) * (DS * STEPS * size) + q[:, None] * O1P + o1[None, :]
    for step in tl.range(0, STEPS, num_stages=STAGES):
        t = token + step * BM + r // I1P
        v = tl.load(x + t.to(tl.int64)[:, None] * wide + at, mask=real & (t < M)[:, None], other=0.0)
        inner = dot(v, core, tl.zeros((BM * I1P, AB * O3P), tl.float32), F32).to(v.dtype)
        inner = tl.permute(tl.reshape(inner, (BM, I1P, AB, O3P)), (0, 3, 1, 2))
        outer = dot(tl.reshape(inner, (BM * O3P, I1P * AB)), w1, tl.zeros((BM * O3P, O1P), tl.float32), F32)
        if DS == 1:
            t = token + step * BM + q // O3P
            tl.store(y + t.to(tl.int64)[:, None] * rows + place, outer.to(y.dtype.element_ty),
                     mask=inside & (t < M)[:, None])  # fmt: skip
        else:
            tl.store(part + (slice * STEPS + step) * size, outer)
    if DS > 1:
        if publish(counters + block) == DS - 1:
            for step in tl.range(0, STEPS):
                outer = tl.zeros((BM * O3P, O1P), tl.float32)
                for each in tl.static_range(DS):
                    outer += tl.load(part + (each * STEPS + step) * size, volatile=True)
                t = token + step * BM + q // O3P
                tl.store(y + t.to(tl.int64)[:, None] * rows + place, outer.to(y.dtype.element_ty),
                         mask=inside & (t < M)[:, None])  # fmt: skip
            tl.atomic_xchg(counters + block, 0, sem="relaxed")
