"""Device code of the fast Hadamard transform: a block of x as a matrix between two matrices of signs."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, grid_wait


@triton.jit
def flipped(value, signs, at):
    """``value`` times the sign of entry ``at``, one bit each, the lowest first; float32."""
    bit = (tl.load(signs + at // 8) >> (at % 8).to(tl.uint8)) & 1
    return tl.where(bit != 0, -value.to(tl.float32), value.to(tl.float32))


@triton.jit
def hadamard(x, signs, left, right, y, unit, blocks, P, Q, PP: tl.constexpr, KB: tl.constexpr, QB: tl.constexpr,
             RB: tl.constexpr, INVERSE: tl.constexpr, EXACT: tl.constexpr, F32: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """``unit * left X rightᵀ`` of one block X (P, Q), ``QB`` of its columns; ``INVERSE`` takes both transposed.

    Signs go onto X before, or with ``INVERSE`` onto the result. The first product takes x as it is (exact in any narrow
    dtype), the second float32 in three TF32 parts (``EXACT`` for float32 x: both).
    """
    block = tl.program_id(0).to(tl.int64)
    size = P * Q
    inside = (block % blocks).to(tl.int32) * size  # where the block begins in its row
    p = tl.arange(0, PP)
    c = tl.program_id(1) * QB + tl.arange(0, QB)
    acc = tl.zeros((PP, QB), tl.float32)
    grid_wait(PDL)
    for k0 in tl.range(0, Q, KB):
        k = k0 + tl.arange(0, KB)
        real = (p < P)[:, None] & (k < Q)[None, :]
        at = p[:, None] * Q + k[None, :]
        value = tl.load(x + block * size + at, mask=real, other=0.0)
        if not INVERSE:
            value = flipped(value, signs, tl.where(real, inside + at, 0)).to(x.dtype.element_ty)
        place = k[:, None] * Q + c[None, :] if INVERSE else c[None, :] * Q + k[:, None]
        m = tl.load(right + place, mask=(k < Q)[:, None] & (c < Q)[None, :], other=0)
        if EXACT and not F32:
            acc = tl.dot(value, m.to(tl.float32), acc, input_precision="tf32x3")
        else:
            acc = dot(value, m.to(tl.float32).to(value.dtype), acc, F32)
    for r0 in tl.range(0, P, RB):
        r = r0 + tl.arange(0, RB)
        place = p[None, :] * P + r[:, None] if INVERSE else r[:, None] * P + p[None, :]
        m = tl.load(left + place, mask=(r < P)[:, None] & (p < P)[None, :], other=0).to(tl.float32)
        out = tl.dot(m, acc, input_precision="ieee" if F32 else "tf32x3")
        real = (r < P)[:, None] & (c < Q)[None, :]
        at = r[:, None] * Q + c[None, :]
        out = out * unit
        if INVERSE:
            out = flipped(out, signs, tl.where(real, inside + at, 0))
        tl.store(y + block * size + at, out.to(y.dtype.element_ty), mask=real)
