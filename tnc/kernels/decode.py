"""Device functions that every kernel shares: codes to numbers, x, dots, and programs that wait for programs."""

# ruff: noqa: ANN001, ANN201, SIM108 -- device code, which Triton reads in its own way

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SPINS = tl.constexpr(1 << 20)  # polls of a counter before the answer is poisoned with NaN; about half a second
SPOTS = tl.constexpr(8)  # counters of one announcement, 32 apart


@triton.jit
def nibbles(words, high, PART: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """int32 words whose codes begin every 4 bits (3-bit formats) or as stored."""
    if BITS == 3:
        # bit 2 of a nibble from the shifted high plane, the others from the low plane; bit 3 is masked by `lifted`
        low = words if PART == 0 else words >> 2
        raised = high << 2 if PART == 0 else high << 1
        if ASM:  # written as a choice of bits it becomes two LOP3
            return tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, 0x44444444, 0xd8;", "=r,r,r", [low, raised],
                                             dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
        else:
            return (low & 0x33333333) | (raised & 0x44444444)
    else:
        return words


@triton.jit
def lifted(words, at: tl.constexpr, one, BITS: tl.constexpr):
    """float32 ``offset + code`` of the code whose lowest bit is ``at``, by its bit pattern; and the offset.

    The code lies between bits 12 and 22 of the mantissa, so that codes share shifts: the offset ``2**(23 - place)`` is
    at most 2**11. ``one`` is the pattern of 2**7, at run time: with two immediates mask and pattern take two LOP3.
    """
    top: tl.constexpr = 23 - BITS
    if BITS == 8:
        SHIFT: tl.constexpr = 15 - at
    elif at < 12:
        NEAR: tl.constexpr = 10 if BITS == 2 else 8
        SHIFT: tl.constexpr = NEAR if at + NEAR >= 12 else 12
    elif at > top:
        NEAR: tl.constexpr = 10 if BITS == 2 else 8
        SHIFT: tl.constexpr = -NEAR if at - NEAR <= top else -12
    else:
        SHIFT: tl.constexpr = 0
    place: tl.constexpr = at + SHIFT
    mask: tl.constexpr = ((1 << BITS) - 1) << place
    if SHIFT >= 0:
        moved = words << SHIFT
    else:
        moved = words >> (-SHIFT)
    value = ((moved & mask) | (one + ((16 - place) << 23))).to(tl.float32, bitcast=True)
    return value, 1.0 * (1 << (23 - place))


@triton.jit
def scale_and_zero(word, SCALE: tl.constexpr):
    """float32 scale and zero point of a group word; a float32 scale (``single``) has no zero point."""
    if SCALE == "single":
        return word.to(tl.float32, bitcast=True), 0.0
    elif SCALE == "half":
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), (word >> 16).to(tl.float32)
    else:
        return (word << 16).to(tl.float32, bitcast=True), (word >> 16).to(tl.float32)


@triton.jit
def scale_pair(word):
    """float32 scales of the two groups of 16 columns that share a word."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def half_nibbles(words, high, PART: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """`nibbles` of int16 half words; two at a time where ``ASM``."""
    if BITS != 3:
        return words
    elif ASM:
        if PART == 0:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; shl.b32 t, $2, 2; lop3.b32 $0, $1, t, 0x44444444, 0xd8; }",
                "=r,r,r", [words, high], dtype=tl.int16, is_pure=True, pack=2)  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t, u; shl.b32 t, $2, 1; shr.b32 u, $1, 2; lop3.b32 $0, u, t, 0x44444444, 0xd8; }",
                "=r,r,r", [words, high], dtype=tl.int16, is_pure=True, pack=2)  # fmt: skip
    else:
        low = words if PART == 0 else words >> 2
        raised = high << 2 if PART == 0 else high << 1
        return (low & 0x3333) | (raised & 0x4444)


@triton.jit
def centred(words, zero, at: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """``code - zero``, exact in bfloat16 or float16 (``HALF``), of the code at bit ``at`` of int16 half words.

    Two at a time where ``ASM``: 128 + code (or 1024 + code) by its bit pattern, less 128 + zero, which ``zero`` holds.
    """
    if ASM and BITS != 8:
        if HALF:
            kind: tl.constexpr = "f16"
            one: tl.constexpr = "0x64006400"
        else:
            kind: tl.constexpr = "bf16"
            one: tl.constexpr = "0x43004300"
        mask: tl.constexpr = "0x000f000f" if BITS == 4 else ("0x00070007" if BITS == 3 else "0x00030003")
        code: tl.constexpr = (
            f"{{ .reg .b32 t; shr.b32 t, $1, {at}; lop3.b32 t, t, {mask}, {one}, 0xea; sub.{kind}x2 $0, t, $2; }}"
        )
        return tl.inline_asm_elementwise(code, "=r,r,r", [words, zero], dtype=zero.dtype, is_pure=True, pack=2)
    else:
        value = ((words >> at) & ((1 << BITS) - 1)).to(tl.float32) - zero.to(tl.float32)
        return value.to(tl.float16) if HALF else value.to(tl.bfloat16)


@triton.jit
def member_of(block, firsts):
    """Which of several operators in one launch a block of rows belongs to; ``firsts`` are their first blocks."""
    which = 0
    for i in tl.static_range(1, len(firsts)):
        which += (block >= firsts[i]).to(tl.int32)
    return which


@triton.jit
def chosen(each, which):
    """``each[which]`` of a tuple of pointers or numbers; of a tuple of one that one, whatever ``which``."""
    found = each[0]
    for i in tl.static_range(1, len(each)):
        found = tl.where(which == i, each[i], found)
    return found


@triton.jit
def dot(a, b, acc, F32: tl.constexpr):
    """``acc + a b`` in float32; ``F32`` for float32 inputs and the interpreter, whose bfloat16 dot is wrong."""
    if F32:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_apart(a, b, acc, F32: tl.constexpr):
    """`dot` that has finished before its operands' memory is used again.

    Unrolled dots that pass one accumulator on were wrong on Hopper (Triton 3.6, 64 rows and more): the second
    operands reached shared memory while the first product still read it.
    """
    if F32:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return acc + tl.dot(a, b)


@triton.jit
def entries(x, order, factor, k, real):
    """Entries ``k`` of x where ``real``, else 0: those that ``order`` names, times ``factor``; rounded to x's dtype."""
    at = k if order is None else tl.load(order + k, mask=real, other=0).to(tl.int32)
    value = tl.load(x + at, mask=real, other=0.0)
    if factor is not None:
        scale = tl.load(factor + k, mask=real, other=0.0).to(value.dtype)
        value = (value.to(tl.float32) * scale.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def wait_for(counter, target):
    """Poll until ``counter`` reaches ``target``; whether it did."""
    spins = 0
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while (seen < target) & (spins < SPINS):
        seen = tl.atomic_add(counter, 0, sem="acquire")
        spins += 1
    return seen >= target


@triton.jit
def handed_over(counters, producers, consumers):
    """Wait until all ``producers`` have published; whether they have. What they stored may be read after it.

    ``counters[0]`` counts the producers, ``counters[1]`` the programs that saw them all. Each of ``consumers``
    programs calls this once, and the last of them leaves both counters at zero: nobody polls them any more.
    """
    fine = wait_for(counters, producers)
    if tl.atomic_add(counters + 1, 1, sem="relaxed") == consumers - 1:
        tl.atomic_xchg(counters, 0, sem="relaxed")
        tl.atomic_xchg(counters + 1, 0, sem="relaxed")
    return fine


@triton.jit
def publish(counter):
    """Release what the whole program stored, and count it; the count before."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def waiters(low, high, spot):
    """How many programs from ``low`` to below ``high`` watch the counter ``spot``: those equal to it modulo `SPOTS`."""
    return (high - spot + SPOTS - 1) // SPOTS - (low - spot + SPOTS - 1) // SPOTS


@triton.jit
def announce(counters, first, makers, low, high):
    """Release what one of ``makers`` programs stored to the programs ``low`` to ``high``, which call `heard`.

    ``SPOTS`` counters, so that few programs poll one. The ``first`` maker begins at minus all that is still
    to come, so a counter is negative and at least minus its watchers once all is there, and zero when all have seen it.
    """
    spot = tl.arange(0, SPOTS)
    start = 1 - makers - waiters(low, high, spot)
    tl.debug_barrier()
    tl.atomic_add(counters + 32 * spot, tl.where(first, start, 1), sem="release")


@triton.jit
def heard(counters, own, low, high):
    """Wait, as the program ``own``, until all makers have announced; whether they have."""
    spot = own % SPOTS
    least = -waiters(low, high, spot)
    counter = counters + 32 * spot
    spins = 0
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while ((seen >= 0) | (seen < least)) & (spins < SPINS):
        seen = tl.atomic_add(counter, 0, sem="acquire")
        spins += 1
    tl.atomic_add(counter, 1, sem="relaxed")
    return (seen < 0) & (seen >= least)


@triton.jit
def grid_wait(PDL: tl.constexpr):
    """From here on what earlier kernels wrote may be read, and the next kernel may begin its preamble."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
