"""Hadamard matrices: entries 1 and -1, ``M Mᵀ = n I``, built from formulas.

- Sylvester 1867: ``n = 2^p``, Kronecker powers of ``[[1, 1], [1, -1]]``.
- Paley 1933, I: ``n = q + 1`` for a prime power ``q = 3 mod 4``; II: ``n = 2 (q + 1)`` for ``q = 1 mod 4``.
- Williamson 1944: ``n = 4 t`` from four symmetric circulants with ``A² + B² + C² + D² = 4 t I``.
- Baumert and Hall 1965: ``n = 12 t`` from the same circulants, here as Cooper and Wallis (1972) build it: T-matrices of
  order 3 in the array of Goethals and Seidel (1967).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.hadamard.finite_field import character_matrix, prime_power

# First rows of Williamson's four circulants, for the orders 4 t (or 12 t) that neither Sylvester nor Paley reach. Found
# by search: all symmetric rows whose power spectrum stays below 4 t are matched in pairs (t = 43: of those invariant
# under i -> 6 i only, 128 rows). tests/hadamard repeats the search.
_WILLIAMSON = {
    13: ("++++-+--+-+++", "++---+--+---+", "++---+--+---+", "+---+-++-+---"),
    23: ("+--++-+-+-++++-+-+-++--", "+++---++--++++--++---++", "+--+-+-++++++++++-+-+--", "+--+--+++------+++--+--"),
    29: (
        "+--+-++---++++++++++---++-+--", "+-+-++---+--++++++--+---++-+-",
        "+++-++-++++---++---++++-++-++", "+-+-+----++-++--++-++----+-+-",
    ),
    43: (
        "++-+--++-+++----+++-++++-+++----+++-++--+-+", "+--+++--+-+--+-+++++-++-+++++-+--+-+--+++--",
        "+-+-+----++++-++++-++--++-++++-++++----+-+-", "+--++----+-+---+--++++++++--+---+-+----++--",
    ),
}  # fmt: skip


@lru_cache(maxsize=64)
def hadamard_matrix(order: int) -> Tensor:
    """The Hadamard matrix that the library uses for ``order``, (order, order) int8; do not change it.

    Checkpoints store orders, not matrices: what an order stands for never changes.

    Raises:
        ShapeError: if none of the constructions gives this order; products of orders are not tried here.
    """
    kind = construction(order)
    if kind is None:
        raise ShapeError(
            f"no Hadamard matrix of order {order} is known here; expected 2^p, q + 1 or 2 (q + 1) for a prime "
            "power q, or 92, 116, 156, 172. Use block_factors for the largest block that divides a size."
        )
    return _BUILDERS[kind](order)


def construction(order: int) -> str | None:
    """Name of the construction that gives ``order``, the first of those above; ``None`` if none does."""
    if order >= 1 and order & (order - 1) == 0:
        return "sylvester"
    if order < 4 or order % 4:
        return None
    if prime_power(order - 1) is not None:  # odd, and 3 mod 4
        return "paley I"
    if (order // 2 - 1) % 4 == 1 and prime_power(order // 2 - 1) is not None:
        return "paley II"
    if order // 4 in _WILLIAMSON:
        return "williamson"
    return "baumert-hall" if order % 12 == 0 and order // 12 in _WILLIAMSON else None


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while matrix.shape[0] < order:
        matrix = torch.kron(two, matrix)
    return matrix


def _paley_one(order: int) -> Tensor:
    """``I + [[0, 1ᵀ], [-1, Q]]`` with the skew character matrix Q."""
    skew = _bordered(character_matrix(order - 1))
    skew[1:, 0] = -1
    return skew + torch.eye(order, dtype=torch.int8)


def _paley_two(order: int) -> Tensor:
    """``C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]`` with ``C = [[0, 1ᵀ], [1, Q]]`` symmetric."""
    conference = _bordered(character_matrix(order // 2 - 1))
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, plus) + torch.kron(torch.eye(order // 2, dtype=torch.int8), minus)


def _williamson(order: int) -> Tensor:
    A, B, C, D = map(_circulant, _WILLIAMSON[order // 4])
    rows = ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))
    return torch.cat([torch.cat(row, 1) for row in rows])


def _baumert_hall(order: int) -> Tensor:
    """Four matrices ``X_i`` over Z_3 x Z_t with ``sum X_i X_iᵀ = 12 t I``, in the array of Goethals and Seidel.

    ``X_1 = T_1 ⊗ A + T_2 ⊗ B + T_3 ⊗ C`` and so on (Cooper and Wallis), with ``T_i`` the powers of the cyclic shift,
    which are disjoint, and ``T_4 = 0``. ``R`` sends every element of the group to its inverse.
    """
    A, B, C, D = map(_circulant, _WILLIAMSON[order // 12])
    shift = torch.eye(3, dtype=torch.int8).roll(1, 1)
    T = (torch.eye(3, dtype=torch.int8), shift, shift @ shift)
    terms = ((A, B, C), (-B, A, D), (-C, -D, A), (-D, C, -B))
    W, X, Y, Z = (sum((torch.kron(t, m) for t, m in zip(T, row, strict=True)), torch.tensor(0)) for row in terms)
    size = torch.arange(3), torch.arange(order // 12)
    R = torch.kron(*(torch.eye(len(n), dtype=torch.int8)[-n % len(n)] for n in size))
    rows = (
        (W, X @ R, Y @ R, Z @ R), (-X @ R, W, Z.T @ R, -Y.T @ R),
        (-Y @ R, -Z.T @ R, W, X.T @ R), (-Z @ R, Y.T @ R, -X.T @ R, W),
    )  # fmt: skip
    return torch.cat([torch.cat(row, 1) for row in rows]).to(torch.int8)


def _bordered(character: Tensor) -> Tensor:
    q = character.shape[0]
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character
    return matrix


def _circulant(row: str) -> Tensor:
    values = torch.tensor([1 if c == "+" else -1 for c in row], dtype=torch.int8)
    index = torch.arange(len(row))
    return values[(index - index.unsqueeze(1)) % len(row)]


_BUILDERS = {
    "sylvester": _sylvester, "paley I": _paley_one, "paley II": _paley_two, "williamson": _williamson,
    "baumert-hall": _baumert_hall,
}  # fmt: skip
