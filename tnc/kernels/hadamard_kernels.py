"""Device code of the fast Hadamard transform: a block of x as a matrix between two matrices of signs."""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import dot, entries, grid_wait


@triton.jit
def negations(signs, first, c, p, Q: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    """1 where entry ``first + Q p + c`` is negated, else 0, for ``SIZE`` columns from c on: (SIZE, rows).

    Signs are bits, the lowest first. Rows that begin at whole nibbles need a load for four entries.
    """
    if Q % 4 == 0:
        four = c + 4 * tl.arange(0, SIZE // 4)
        at = first + four[:, None] + Q * p[None, :]
        byte = tl.load(signs + at // 8, mask=(four < Q)[:, None] & (p < P)[None, :], other=0).to(tl.int32) >> (at & 4)
        return tl.reshape((byte[:, None, :] >> tl.arange(0, 4)[None, :, None]) & 1, (SIZE, p.shape[0]))
    else:
        one = c + tl.arange(0, SIZE)
        at = first + one[:, None] + Q * p[None, :]
        byte = tl.load(signs + at // 8, mask=(one < Q)[:, None] & (p < P)[None, :], other=0).to(tl.int32)
        return (byte >> (at & 7)) & 1


@triton.jit
def in_three(a):
    """float32 as the sum of three parts in bfloat16, exactly."""
    high = a.to(tl.bfloat16)
    rest = a - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def signs_times(signs, value, acc, F32: tl.constexpr):
    """``acc + signs value`` in float32; exact products for every dtype of ``value``."""
    if F32 or value.dtype != tl.float32:
        return dot(signs.to(value.dtype), value, acc, F32)
    else:
        high, middle, low = in_three(value)
        return tl.dot(signs, high, tl.dot(signs, middle, tl.dot(signs, low, acc)))


@triton.jit
def times_signs(a, signs, F32: tl.constexpr):
    """``a signs`` in float32 for float32 a, with exact products."""
    if F32:
        return tl.dot(a, signs.to(tl.float32), input_precision="ieee")
    else:
        high, middle, low = in_three(a)
        return tl.dot(high, signs, tl.dot(middle, signs, tl.dot(low, signs)))


@triton.jit
def flipped(value, negated):
    """``value`` times -1 where ``negated`` is 1, by its sign bit."""
    if value.dtype == tl.float32:
        return (value.to(tl.int32, bitcast=True) ^ (negated << 31)).to(tl.float32, bitcast=True)
    else:
        return (value.to(tl.int16, bitcast=True) ^ (negated << 15).to(tl.int16)).to(value.dtype, bitcast=True)


@triton.jit
def side(matrix, i, j, SIZE: tl.constexpr, TURNED: tl.constexpr):
    """Entries (i, j) of a matrix of signs (SIZE, SIZE), or of its transpose; zero outside."""
    place = j[None, :] * SIZE + i[:, None] if TURNED else i[:, None] * SIZE + j[None, :]
    return tl.load(matrix + place, mask=(i < SIZE)[:, None] & (j < SIZE)[None, :], other=0.0)


@triton.jit
def rotated(x, made, change, block, part, STRIDE, K: tl.constexpr, FORM: tl.constexpr, unit, F32: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """``unit * left X rightᵀ`` of one block X (P, Q) of one token, ``QB`` of its columns; ``INVERSE``: both transposed.

    Signs go onto X before, or with ``INVERSE`` onto the result. The products are made transposed, ``QB`` rows of them:
    below 64 rows they need no whole group of warps. x may be gathered and scaled on its way (`entries`).
    """
    P: tl.constexpr = FORM[0]
    Q: tl.constexpr = FORM[1]
    INVERSE: tl.constexpr = FORM[2]
    PP: tl.constexpr = FORM[3]
    QB: tl.constexpr = FORM[4]
    KB: tl.constexpr = FORM[5]
    order, factor, signs, left, right = change[0], change[1], change[2], change[3], change[4]
    token = (block // (K // (P * Q))).to(tl.int64)
    inside = block % (K // (P * Q)) * (P * Q)
    c = part * QB + tl.arange(0, QB)
    p = tl.arange(0, PP)
    acc = tl.zeros((QB, PP), tl.float32)
    k = tl.arange(0, KB)
    m = side(right, c, k, Q, INVERSE)  # what does not depend on x is on its way before x is waited for
    if not INVERSE:
        negated = negations(signs, inside, 0, p, Q, P, KB)
    R: tl.constexpr = PP if PP < 64 else 64  # rows of the answer at a time
    n = side(left, p, tl.arange(0, R), P, not INVERSE)
    grid_wait(PDL)
    for k0 in tl.static_range(0, Q, KB):
        k = k0 + tl.arange(0, KB)
        if k0 > 0:
            m = side(right, c, k, Q, INVERSE)
            if not INVERSE:
                negated = negations(signs, inside, k0, p, Q, P, KB)
        at = inside + k[:, None] + p[None, :] * Q
        value = entries(x + token * STRIDE, order, factor, at, (k < Q)[:, None] & (p < P)[None, :])
        if not INVERSE:
            value = flipped(value, negated)
        acc = signs_times(m, value, acc, F32)
    for r0 in tl.static_range(0, PP, R):
        r = r0 + tl.arange(0, R)
        if r0 > 0:
            n = side(left, p, r, P, not INVERSE)
        out = times_signs(acc, n, F32) * unit
        if INVERSE:
            out = flipped(out, negations(signs, inside, part * QB, r, Q, P, QB))
        place = token * K + inside + c[:, None] + r[None, :] * Q
        tl.store(made + place, out.to(made.dtype.element_ty), mask=(c < Q)[:, None] & (r < P)[None, :])


@triton.jit
def hadamard(x, y, change, unit, K: tl.constexpr, FORM: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr):
    """One token's block (first axis of programs), a few of its columns (second axis); as `rotated`."""
    rotated(x, y, change, tl.program_id(0), tl.program_id(1), K, K, FORM, unit, F32, PDL)
