"""One truncated orthogonal split of a matrix, ``M ≈ basis @ rest``: the step every tensor-train sweep is made of.

Three solvers, chosen by size and by how small a tail must be resolved:

- *Gram*: eigenvectors of ``M Mᵀ`` or ``Mᵀ M``, whichever is smaller, summed in float64. It squares the
  spectrum, so tails below 1e-12 of the energy are beyond it.
- *Krylov*: a block Krylov space, for large matrices of which few directions are wanted. Matrix products only.
- *SVD*: float64, where the tail asked for, or found, is too small for a Gram matrix.

A split at full rank is exact and needs none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GRAM_LIMIT = 1024  # smaller side up to which the whole eigenproblem takes a second on one core
_GRAM_FLOOR = 1e-12  # of the energy: the smallest tail that a float64 Gram matrix resolves
_SINGLE_FLOOR = 1e-5  # the same for energies of float32 products
_BLOCK = 48  # columns of a Krylov block
_SETTLED = 1e-5  # a Krylov space is large enough when another block lowers the squared error by less, relatively
_CHUNK = 2**22  # entries of a float64 chunk behind a Gram matrix


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

    Cost: Gram ``p q min(p, q)`` float64 and an eigenproblem of the smaller side; Krylov about ``12 p q r``.
    """
    small = min(matrix.shape[-2:])
    if rank >= small and tail is None:
        return _exact(matrix)
    if small > _GRAM_LIMIT and (tail is not None or 4 * rank <= small):
        if matrix.ndim > 2:
            return _stack([split(each, rank, tail, seed=seed) for each in matrix])
        return _split_large(matrix, rank, tail, seed)
    energy = _energy(matrix)
    if tail is not None and tail < _GRAM_FLOOR * float(energy):
        return _svd(matrix, rank, tail)
    return _gram(matrix, rank, tail, energy)


def _split_large(matrix: Tensor, rank: int, tail: float | None, seed: int) -> Split:
    """Krylov in the dtype given, again in float64 where the tail is below the rounding of float32, then the rest."""
    energy = float(_energy(matrix))
    if energy == 0:
        keep = 1 if tail is not None else rank
        basis = torch.eye(matrix.shape[0], keep, dtype=matrix.dtype, device=matrix.device)
        return Split(basis, basis.mT @ matrix, torch.zeros((), dtype=torch.float64))
    single = matrix.dtype == torch.float32
    if not (single and tail is not None and tail < _SINGLE_FLOOR * energy):
        found = _krylov(matrix, rank, tail, energy, seed)
        if found is not None and not (single and float(found.tail) < _SINGLE_FLOOR * energy):
            return found
        if found is None:
            return _gram(matrix, rank, tail, torch.tensor(energy, dtype=torch.float64))
    if tail is not None and tail < _GRAM_FLOOR * energy:
        return _svd(matrix, rank, tail)
    wide = matrix.double()
    found = _krylov(wide, rank, tail, energy, seed) or _gram(wide, rank, tail, _energy(wide))
    return Split(found.basis.to(matrix.dtype), found.rest.to(matrix.dtype), found.tail, found.note)


def _energy(matrix: Tensor) -> Tensor:
    """(...) squared Frobenius norms, float64."""
    energy: Tensor = torch.linalg.vector_norm(matrix.flatten(-2), dim=-1, dtype=torch.float64).square()
    return energy


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
    left = _left_over(s.square())
    keep = _count(left, rank, tail)
    basis, rest = U[..., :keep].to(matrix.dtype), (s[..., :keep, None] * Vh[..., :keep, :]).to(matrix.dtype)
    return Split(basis, rest, left[..., keep], "exact SVD: the tail is below what a float64 Gram matrix resolves")


def _gram(matrix: Tensor, rank: int, tail: float | None, energy: Tensor) -> Split:
    on_rows = matrix.shape[-2] <= matrix.shape[-1]
    values, vectors = torch.linalg.eigh(_small_gram(matrix if on_rows else matrix.mT))
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    left = _left_over(values)
    keep = _count(left, rank, tail)
    if bool((left[..., keep] < _GRAM_FLOOR * energy).any()):
        return _svd(matrix, rank, tail)
    chosen = vectors[..., :keep].to(matrix.dtype)
    if on_rows:
        return Split(chosen, chosen.mT @ matrix, left[..., keep])
    basis, triangle = torch.linalg.qr(matrix @ chosen)  # no division by singular values, which may be zero
    return Split(basis, triangle @ chosen.mT, left[..., keep])


def _small_gram(wide: Tensor) -> Tensor:
    """``M Mᵀ`` in float64 of (..., p, q), a chunk of columns at a time."""
    width = max(_CHUNK // max(wide.shape[-2], 1), 1)
    total = torch.zeros(*wide.shape[:-2], wide.shape[-2], wide.shape[-2], dtype=torch.float64, device=wide.device)
    for chunk in torch.split(wide, width, dim=-1):
        columns = chunk.double()
        total += columns @ columns.mT
    return total


def _left_over(energies: Tensor) -> Tensor:
    """(..., k + 1) sums of ``energies[..., r:]`` for r = 0 .. k."""
    sums = energies.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, sums.new_zeros(*sums.shape[:-1], 1)], dim=-1)


def _count(left: Tensor, rank: int, tail: float | None) -> int:
    """How many directions to keep: at most ``rank``, the fewest that leave ``tail``, at least one."""
    most = min(rank, left.shape[-1] - 1)
    if tail is None:
        return most
    within = int((left > tail).sum())  # left never rises: the first entry within the tail
    return max(min(within, most), 1)


def _krylov(matrix: Tensor, rank: int, tail: float | None, energy: float, seed: int) -> Split | None:
    """Block Krylov space of ``M Mᵀ`` (Musco and Musco 2015, arXiv:1504.05477); ``None`` where it would grow too large.

    The squared error is exact for the space at hand, ``energy - ||rest||²``; blocks are added until another one
    would not lower it.
    """
    width = _BLOCK if tail is not None else max(_BLOCK, rank // 2)
    generator = torch.Generator().manual_seed(seed)
    block = matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    bases: list[Tensor] = []
    rests: list[Tensor] = []
    gram = torch.zeros(0, 0, dtype=torch.float64, device=matrix.device)
    before, kept = float("inf"), 0
    while 2 * (len(gram) + width) <= min(matrix.shape):
        bases.append(_against(block, bases))
        rests.append(bases[-1].mT @ matrix)
        gram = _grown(gram, rests)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
        left = torch.cat([values.new_full((1,), energy), energy - values.cumsum(-1)]).clamp_min(0)
        keep = _count(left, rank, tail)
        error = float(left[keep])
        reached = keep == rank or (tail is not None and error <= tail)
        settled = keep == kept and before - error <= _SETTLED * error
        if (reached and settled) or float(left[-1]) <= torch.finfo(matrix.dtype).eps * energy:
            chosen = vectors[:, :keep].to(matrix.dtype)
            return Split(torch.cat(bases, dim=1) @ chosen, chosen.mT @ torch.cat(rests), left[keep])
        before, kept = error, keep
        block = matrix @ rests[-1].mT
    return None


def _grown(gram: Tensor, rests: list[Tensor]) -> Tensor:
    """``C Cᵀ`` in float64 of the stacked ``rests``, from that of all but the last."""
    last = rests[-1].double()
    edge = (
        torch.cat([rest.double() @ last.mT for rest in rests[:-1]]) if len(rests) > 1 else gram.new_zeros(0, len(last))
    )
    return torch.cat([torch.cat([gram, edge], dim=1), torch.cat([edge.mT, last @ last.mT], dim=1)])


def _against(block: Tensor, bases: list[Tensor]) -> Tensor:
    """Orthonormal basis of the part of ``block`` outside the earlier bases; twice is enough (Kahan)."""
    for _ in range(2):
        for basis in bases:
            block = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(block).Q
    return block


def _stack(parts: list[Split]) -> Split:
    """Splits of one rank as a batch."""
    notes = {part.note for part in parts} - {None}
    return Split(
        torch.stack([part.basis for part in parts]),
        torch.stack([part.rest for part in parts]),
        torch.stack([part.tail.cpu() for part in parts]),
        ", ".join(sorted(note for note in notes if note)) or None,
    )
