"""Which Kronecker factors make a Hadamard matrix of a given size, the cheapest transform first."""

from __future__ import annotations

from functools import lru_cache

from tnc.hadamard.constructions import construction


@lru_cache(maxsize=4096)
def hadamard_factors(order: int) -> tuple[int, ...] | None:
    """Orders whose Kronecker product is a Hadamard matrix of ``order``; ``None`` if there are none.

    At most one power of two, first where there is one, then other orders ascending; their sum, which is what
    the transform costs, is the least possible. ``hadamard_factors(11008)`` is ``(64, 172)``.
    """
    if order < 1:
        return None
    found = _odd_factors(order)
    if found is None:
        return None
    two, others = found
    return (*((two,) if two > 1 or not others else ()), *others)


def block_factors(size: int) -> tuple[int, ...]:
    """Factors of the largest Hadamard matrix whose order divides ``size``: the block of a block-diagonal rotation.

    ``(1,)`` for odd sizes, which no Hadamard matrix above order 1 divides.
    """
    for count in range(1, size + 1):
        factors = hadamard_factors(size // count) if size % count == 0 else None
        if factors is not None:
            return factors
    return (1,)


@lru_cache(maxsize=4096)
def _odd_factors(order: int) -> tuple[int, tuple[int, ...]] | None:
    """(power of two, other orders ascending) of least cost."""
    odd = order // (order & -order)
    if odd == 1:
        return order, ()
    best: tuple[int, tuple[int, ...]] | None = None
    for factor in range(4, order + 1, 4):
        if order % factor or factor & (factor - 1) == 0 or construction(factor) is None:
            continue
        rest = _odd_factors(order // factor)
        if rest is not None and (not rest[1] or factor <= rest[1][0]):
            candidate = (rest[0], (factor, *rest[1]))
            best = candidate if best is None or _cost(candidate) < _cost(best) else best
    return best


def _cost(factors: tuple[int, tuple[int, ...]]) -> int:
    two, others = factors
    return 2 * (two.bit_length() - 1) + sum(others)
