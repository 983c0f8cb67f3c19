"""The quadratic character of a finite field GF(p^k), for Paley's construction."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

Polynomial = tuple[int, ...]  # coefficients, the constant first


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with ``q = p**k`` and p prime, or ``None``."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def character_matrix(q: int) -> Tensor:
    """``Q[i, j] = chi(a_i - a_j)`` over the elements of GF(q), (q, q) int8.

    ``chi`` is 0 at 0, 1 at nonzero squares and -1 elsewhere; q is an odd prime power. Elements are in
    lexicographic order of their coefficients, so for prime q ``a_i = i``.

    Cost: O(q²) field subtractions in Python, once an order.
    """
    found = prime_power(q)
    assert found is not None and q % 2, "orders are checked before"
    p, k = found
    elements = [tuple(reversed(digits)) for digits in product(range(p), repeat=k)]
    modulus = _irreducible(p, k)
    squares = {_multiply(a, a, modulus, p) for a in elements[1:]}
    chi = {a: 1 if a in squares else -1 for a in elements} | {elements[0]: 0}
    rows = [[chi[tuple((x - y) % p for x, y in zip(a, b, strict=True))] for b in elements] for a in elements]
    return torch.tensor(rows, dtype=torch.int8)


def _multiply(a: Polynomial, b: Polynomial, modulus: Polynomial, p: int) -> Polynomial:
    """``a b`` reduced by the monic ``modulus`` of degree ``len(a)``."""
    k = len(a)
    result = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] = (result[i + j] + x * y) % p
    return tuple(_remainder(result, modulus, p)[:k])


def _remainder(dividend: list[int], divisor: Polynomial, p: int) -> list[int]:
    """Remainder modulo a monic polynomial, zero-padded to the length of the dividend."""
    rest, degree = list(dividend), len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        factor = rest[top]
        for i, c in enumerate(divisor):
            rest[top - degree + i] = (rest[top - degree + i] - factor * c) % p
    return rest


def _irreducible(p: int, k: int) -> Polynomial:
    """The first monic polynomial of degree k over GF(p) that no monic one of degree 1 to k / 2 divides."""
    smaller = [(*low, 1) for degree in range(1, k // 2 + 1) for low in product(range(p), repeat=degree)]
    candidates = ((*low, 1) for low in product(range(p), repeat=k))
    return next(c for c in candidates if all(any(_remainder(list(c), s, p)) for s in smaller))
