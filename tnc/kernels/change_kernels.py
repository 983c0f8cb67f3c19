"""Device code of what happens to x ahead of a multiplication, in the same launch: gathered, scaled, rotated.

A scaling can be made where x is loaded (`tnc.kernels.decode.entries`). A rotation needs all of a block, so programs
with low ids make it, a few columns of one block each, and announce it; the others ask for their weights and wait.
"""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl

from tnc.kernels.decode import announce, entries, grid_wait
from tnc.kernels.hadamard_kernels import rotated


@triton.jit
def make(x, made, change, counters, job, makers, low, STRIDE, K: tl.constexpr, FORM: tl.constexpr, unit,
         F32: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The share ``job`` of the changed x (tokens, K), announced to the programs from ``low`` on.

    ``FORM`` is (P, Q, inverse, padded P, columns a program, columns a step) of a rotation, or (0, entries a program).
    """
    if FORM[0] > 0:
        PARTS: tl.constexpr = (FORM[1] + FORM[4] - 1) // FORM[4]
        rotated(x, made, change, job // PARTS, job % PARTS, STRIDE, K, FORM, unit, F32, PDL)
    else:
        WIDE: tl.constexpr = FORM[1]
        SHARES: tl.constexpr = (K + WIDE - 1) // WIDE
        token = (job // SHARES).to(tl.int64)
        k = job % SHARES * WIDE + tl.arange(0, WIDE)
        grid_wait(PDL)
        value = entries(x + token * STRIDE, change[0], change[1], k, k < K)
        tl.store(made + token * K + k, value, mask=k < K)
    announce(counters, job == 0, makers, low, tl.num_programs(0))
