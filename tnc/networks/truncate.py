"""One truncated orthogonal split of a matrix, ``M ≈ basis @ rest``: the step every tensor-train sweep is made of.

Three solvers, chosen by size and by how small a tail must be resolved:

- *Gram*: eigenvectors of ``M Mᵀ`` or ``Mᵀ M``, whichever is smaller. It squares the spectrum: products in float32,
  summed in float64, resolve tails down to 1e-4 of the energy, products in float64 down to 1e-12.
- *Krylov*: a block Krylov space, for large matrices of which few directions are wanted. Matrix products only.
- *SVD*: float64, where the tail asked for, or found, is too small for a Gram matrix.

A float32 matrix is first tried in float32 and then in float64; the tail is always measured, as the energy that
``rest`` does not hold, and never read off the float32 spectrum. A split at full rank is exact and needs none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.networks.gram import count, descending, energy, left_over, row_gram
from tnc.networks.krylov import krylov

_GRAM_LIMIT = 1024  # smaller side up to which the whole eigenproblem takes a second on one core
_FLOORS = {torch.float32: 1e-4, torch.float64: 1e-12}  # smallest tail, of the energy, that products resolve


@dataclass(frozen=True, eq=False)
class Split:
    """``basis`` (..., p, r) with orthonormal columns, ``rest = basisᵀ M`` (..., r, q), and what they leave over.

    Attributes:
        basis: orthonormal columns.
        rest: the projection of the matrix.
        tail: (...) squared Frobenius norm of ``M - basis @ rest``, float64.
        note: how it was computed, where that is worth saying.
    """

    basis: Tensor
    rest: Tensor
    tail: Tensor
    note: str | None = None


def split(matrix: Tensor, rank: int, tail: float | None = None, *, seed: int = 0) -> Split:
    """Split off at most ``rank`` directions, as few as leave at most ``tail`` where one is given.

    Args:
        matrix: (..., p, q) float32 or float64; batches only without ``tail``, so that all have one rank.
        rank: largest number of directions, at least 1.
        tail: squared error allowed; ``None`` keeps ``rank`` directions, or all there are.
        seed: of the Krylov start.

    Returns:
        The split in the dtype of ``matrix``. It keeps at least one direction.

    Cost: Gram ``p q min(p, q)`` multiply-adds and an eigenproblem of the smaller side; Krylov about ``12 p q r``.
    """
    small = min(matrix.shape[-2:])
    if rank >= small and tail is None:
        return _exact(matrix)
    large = small > _GRAM_LIMIT and (tail is not None or 4 * rank <= small)
    if large and matrix.ndim > 2:
        return _stack([split(each, rank, tail, seed=seed) for each in matrix])
    total = energy(matrix)
    if not bool(total.any()):
        return _nothing(matrix, rank if tail is None else 1)
    for precision in (torch.float32, torch.float64):
        floor = _FLOORS[precision] * total
        if torch.promote_types(precision, matrix.dtype) != precision or (
            tail is not None and bool((tail < floor).any())
        ):
            continue
        found = _by_krylov(matrix, rank, tail, total, precision, seed) if large else None
        if found is None:
            found = _by_gram(matrix, rank, tail, total, precision)
        elif precision == torch.float32 and bool((found.tail < floor).any()):
            continue  # nor would its Gram matrix resolve it, after a minute for 4096 rows
        if found is not None:
            return found
    return _svd(matrix, rank, tail)


def _exact(matrix: Tensor) -> Split:
    """All directions: the identity where rows are few, else a QR factorization. Nothing is lost."""
    p, q = matrix.shape[-2:]
    tail = matrix.new_zeros(matrix.shape[:-2], dtype=torch.float64)
    if p > q:
        basis, rest = torch.linalg.qr(matrix)
        return Split(basis, rest, tail)
    identity = torch.eye(p, dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:-2], p, p)
    return Split(identity.contiguous(), matrix, tail)


def _svd(matrix: Tensor, rank: int, tail: float | None) -> Split:
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    left = left_over(s.square())
    keep = count(left, rank, tail)
    basis, rest = U[..., :keep].to(matrix.dtype), (s[..., :keep, None] * Vh[..., :keep, :]).to(matrix.dtype)
    return Split(basis, rest, left[..., keep], "exact SVD: the tail is below what a float64 Gram matrix resolves")


def _nothing(matrix: Tensor, rank: int) -> Split:
    """Of a zero matrix: any orthonormal columns."""
    p, q = matrix.shape[-2:]
    keep = min(rank, p, q)
    basis = torch.eye(p, keep, dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:-2], p, keep)
    tail = matrix.new_zeros(matrix.shape[:-2], dtype=torch.float64)
    return Split(basis.contiguous(), matrix.new_zeros(*matrix.shape[:-2], keep, q), tail)


def _by_krylov(
    matrix: Tensor, rank: int, tail: float | None, total: Tensor, precision: torch.dtype, seed: int
) -> Split | None:
    found = krylov(matrix.to(precision), rank, tail, float(total), seed)
    if found is None:
        return None
    basis, rest = found
    left = (total - energy(rest)).clamp_min(0)
    return Split(basis.to(matrix.dtype), rest.to(matrix.dtype), left)


def _by_gram(matrix: Tensor, rank: int, tail: float | None, total: Tensor, precision: torch.dtype) -> Split | None:
    """``None`` where the tail is below what products in ``precision`` resolve, or above the one allowed."""
    on_rows = matrix.shape[-2] <= matrix.shape[-1]
    values, vectors = descending(row_gram(matrix if on_rows else matrix.mT, precision))
    left = left_over(values)
    keep = count(left, rank, tail)
    if bool((left[..., keep] < _FLOORS[precision] * total).any()):
        return None
    basis = vectors[..., :keep].to(matrix.dtype)
    if on_rows:
        rest = held = basis.mT @ matrix
    else:
        chosen = basis
        basis, held = torch.linalg.qr(matrix @ chosen)  # no division by singular values, which may be zero
        rest = held @ chosen.mT
    if precision == torch.float64:
        return Split(basis, rest, left[..., keep])
    measured = (total - energy(held)).clamp_min(0)
    missed = tail is not None and keep < rank and bool((measured > tail).any())
    return None if missed else Split(basis, rest, measured)


def _stack(parts: list[Split]) -> Split:
    """Splits of one rank as a batch."""
    notes = {part.note for part in parts} - {None}
    return Split(
        torch.stack([part.basis for part in parts]),
        torch.stack([part.rest for part in parts]),
        torch.stack([part.tail.cpu() for part in parts]),
        ", ".join(sorted(note for note in notes if note)) or None,
    )
