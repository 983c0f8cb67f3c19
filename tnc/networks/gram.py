"""Gram matrices of unfoldings, their energies, and how many of their directions a rank and a tail leave."""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.symmetric import symmetric_product

_CHUNK = 2**22  # entries of a chunk behind a float64 Gram matrix
_SINGLE_COLUMNS = 4096  # of a chunk in float32: rounding of its sums is then 3e-8 of the Gram matrix
_ENERGY_CHUNK = 2**16  # entries squared at a time: they stay in the cache


def energy(matrix: Tensor) -> Tensor:
    """(...) squared Frobenius norms of (..., p, q), float64 sums of float64 squares."""
    flat = matrix.flatten(-2)
    if flat.device.type != "cpu":
        size: Tensor = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)
        return size.square()
    total = flat.new_zeros(flat.shape[:-1], dtype=torch.float64)
    for part in torch.split(flat, _ENERGY_CHUNK, dim=-1):
        wide = part.double()
        total += torch.linalg.vecdot(wide, wide)
    return total


def row_gram(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """``M Mᵀ`` (..., p, p) of (..., p, q), float64: products in ``precision`` of a chunk of columns at a time.

    The chunks are summed in float64, so float32 products cost 3e-8 of the Gram matrix, whatever q is.
    """
    rows = matrix.shape[-2]
    width = _SINGLE_COLUMNS if precision == torch.float32 else max(_CHUNK // max(rows, 1), 1)
    total = matrix.new_zeros(*matrix.shape[:-2], rows, rows, dtype=torch.float64)
    for chunk in torch.split(matrix, width, dim=-1):
        columns = chunk.to(precision)
        total += symmetric_product(columns, columns)
    return total


def descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., p), none negative, and eigenvectors of a Gram matrix, the largest first."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def left_over(energies: Tensor) -> Tensor:
    """(..., k + 1) sums of ``energies[..., r:]`` for r = 0 .. k."""
    sums = energies.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, sums.new_zeros(*sums.shape[:-1], 1)], dim=-1)


def count(left: Tensor, rank: int, tail: float | None) -> int:
    """How many directions to keep: at most ``rank``, the fewest that leave ``tail``, at least one."""
    most = min(rank, left.shape[-1] - 1)
    if tail is None:
        return most
    within = int((left > tail).sum())  # left never rises: the first entry within the tail
    return max(min(within, most), 1)
