"""The optimal column space of a matrix in the metric ``G ⊗ H``, without inverting or damping either.

``min over rank(C) <= k of tr((D-C)ᵀ G (D-C) H)`` is attained by ``C = Z (Zᵀ G D)`` with ``Z`` the top-k
G-orthonormal eigenvectors of ``D H Dᵀ G``; its squared error is the tail of the eigenvalues (MATH.md
section 1, the generalised Eckart–Young theorem). `Exact` uses one symmetric eigenproblem of the smaller
side; `Subspace` uses matrix products only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
from scipy.linalg import eigh as partial_eigh
from torch import Tensor

from tnc.metric import Metric, root
from tnc.symmetric import symmetric_product

# Below this size of the smaller side the whole eigenproblem takes less than a second on one core.
_EXACT_LIMIT = 1024

# Growth of the captured energy in one step of subspace iteration below which the next one is not worth its time.
_CONVERGED = 1e-2


@dataclass(frozen=True)
class Exact:
    """Dense symmetric eigenproblem of the smaller side in float64: exact also for singular G and H."""


@dataclass(frozen=True)
class Subspace:
    """Block subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4).

    Attributes:
        steps: applications of ``D H Dᵀ G`` after the first sketch ``D H Ω``.
        oversample: extra columns beyond the rank.
        seed: seed of the Gaussian ``Ω``.
        most: flat spectra need more steps: they are added, up to ``most`` in all, while the last one raised the
            energy that the block captures by more than 1 %.
    """

    steps: int = 2
    oversample: int = 32
    seed: int = 0
    most: int = 6


Solver = Exact | Subspace


@dataclass(frozen=True, eq=False)
class ColumnSpace:
    """A G-orthonormal basis ``left`` of at most ``rank`` columns and the best right factor for it.

    Attributes:
        left: Z (m, r), ``Zᵀ G Z = I``; r may be less than the rank asked when the spectrum ends before.
        right: ``Zᵀ G D`` (r, n).
        captured: (r,) squared singular values taken out of ``tr(Dᵀ G D H)``, float64, descending.
    """

    left: Tensor
    right: Tensor
    captured: Tensor


def column_space(matrix: Tensor, rank: int, metric: Metric, solver: Solver | None = None) -> ColumnSpace:
    """Optimal column space of ``matrix`` (m, n) for ``rank``; the solver is chosen by size unless named.

    Cost: `Exact` O(m n min(m, n) + m² n + m n²) float64; `Subspace` ``2 (2 m n + n² + m²)(k + p)`` flops a
    step in the dtype of ``matrix``, at least float32.
    """
    chosen = choose_solver((matrix.shape[0], matrix.shape[1]), rank) if solver is None else solver
    if rank == 0 or 0 in matrix.shape:
        return _empty(matrix)
    if isinstance(chosen, Exact):
        return _exact(matrix.double(), rank, metric)
    return _subspace(matrix, rank, metric, chosen)


def choose_solver(shape: tuple[int, int], rank: int) -> Solver:
    """`Exact` where the smaller side is at most 1024 or the rank is over an eighth of it, else `Subspace`."""
    small = min(shape)
    return Exact() if small <= _EXACT_LIMIT or 8 * rank > small else Subspace()


def spectrum(matrix: Tensor, metric: Metric) -> Tensor:
    """Singular values of ``G^½ matrix H^½``, descending, (min(m, n),) float64: the exact error curve.

    The error after the best rank-k term is ``sqrt(sum(spectrum[k:]**2))``.

    Cost: O(min(m, n)³ + m n (m + n)) in float64.
    """
    gram, _ = _small_gram(matrix.double(), metric)
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0).sqrt()


def _small_gram(matrix: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None]:
    """The Gram matrix of ``S_Gᵀ D S_H`` on its smaller side, and the root used on that side."""
    rows, columns = matrix.shape
    if rows <= columns:
        side = root(metric.gradient)
        return _congruence(side, symmetric_product(metric.times_hessian(matrix), matrix)), side
    side = root(metric.hessian)
    return _congruence(side, symmetric_product(matrix.T, metric.times_gradient(matrix).T)), side


def _congruence(side: Tensor | None, gram: Tensor) -> Tensor:
    """``Sᵀ gram S``."""
    if side is None:
        return gram
    side = side.to(gram.device)
    if side.ndim == 1:
        return side.unsqueeze(1) * gram * side
    return symmetric_product(side.T @ gram, side.T)


def _exact(matrix: Tensor, rank: int, metric: Metric) -> ColumnSpace:
    gram, side = _small_gram(matrix, metric)
    values, vectors = _top_eigenpairs(gram, rank)
    on_input_side = matrix.shape[0] > matrix.shape[1]
    if on_input_side:  # right singular vectors V: Z = D S_H V / σ
        lifted = _times_root(matrix, side) @ vectors
        left = lifted / values.sqrt()
        return ColumnSpace(left, left.T @ metric.times_gradient(matrix), values)
    if side is None:  # left singular vectors are Z itself
        return ColumnSpace(vectors, vectors.T @ matrix, values)
    # left singular vectors U = S_Gᵀ Z: the right factor needs no inverse, and Z = D H rightᵀ / σ²
    right = _times_root(vectors.T, side, transpose=True) @ matrix
    return ColumnSpace(metric.times_hessian(matrix) @ right.T / values, right, values)


def _times_root(matrix: Tensor, side: Tensor | None, *, transpose: bool = False) -> Tensor:
    """``matrix @ S`` or ``matrix @ Sᵀ``."""
    if side is None:
        return matrix
    if side.ndim == 1:
        return matrix * side
    return matrix @ (side.T if transpose else side)


def _top_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Largest ``rank`` eigenpairs, descending, without those that are rounding noise."""
    size = gram.shape[0]
    rank = min(rank, size)
    if gram.device.type == "cpu" and 4 * rank < size:  # only the wanted vectors are formed
        found = partial_eigh(gram.numpy(), subset_by_index=[size - rank, size - 1], driver="evr", check_finite=False)
        values, vectors = torch.from_numpy(found[0]), torch.from_numpy(found[1])
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[size - rank :], vectors[:, size - rank :]
    values, vectors = values.flip(0), vectors.flip(1)
    floor = size * torch.finfo(values.dtype).eps * values[:1].clamp_min(0)
    keep = values > floor
    return values[keep], vectors[:, keep]


def _subspace(matrix: Tensor, rank: int, metric: Metric, solver: Subspace) -> ColumnSpace:
    """Iterate on ``D``, ``H`` and ``G`` with largest entry 1: products of their scales overflow float32."""
    size = max(map(abs, map(float, matrix.aminmax()))) or 1.0
    hessian, gradient = _largest(metric.hessian), _largest(metric.gradient)
    matrix = (matrix if matrix.dtype == torch.float64 else matrix.float()) / size
    narrow = metric.to(matrix.dtype, matrix.device)
    unit = Metric(_divided(narrow.hessian, hessian), _divided(narrow.gradient, gradient))
    space = _iterate(matrix, rank, unit, solver)
    root_gradient = gradient**0.5
    return ColumnSpace(
        space.left / root_gradient,
        space.right * (size * root_gradient),
        space.captured * (size**2 * hessian * gradient),
    )


def _iterate(matrix: Tensor, rank: int, metric: Metric, solver: Subspace) -> ColumnSpace:
    width = min(rank + solver.oversample, *matrix.shape)
    generator = torch.Generator().manual_seed(solver.seed)
    sketch = torch.randn(width, matrix.shape[1], generator=generator).to(matrix)
    basis = _orthonormal(matrix @ metric.times_hessian(sketch).T, metric)
    before = 0.0
    for step in count():
        right = metric.times_gradient(basis).T @ matrix  # (width, n)
        weighted = metric.times_hessian(right)
        energy = float((weighted * right).sum())
        if step >= solver.steps and (energy <= (1 + _CONVERGED) * before or step >= solver.most):
            break
        before = energy
        basis = _orthonormal(matrix @ weighted.T, metric)
    gram = (weighted @ right.T).double()
    values, vectors = _top_eigenpairs((gram + gram.T) / 2, rank)
    rotation = vectors.to(matrix.dtype)
    return ColumnSpace(basis @ rotation, rotation.T @ right, values)


def _orthonormal(columns: Tensor, metric: Metric) -> Tensor:
    """G-orthonormal basis of the column space; directions that G does not see in rounding are dropped.

    Householder QR, then ``Q (Qᵀ G Q)^{-½}`` with the small Gram matrix in float64. Without the QR the
    Gram matrix squares the condition of the columns, which a power step has already raised, and directions
    are lost: up to 350 % above the optimum for steep G (eigenvalues ``i^-2``), 0.01 % with it.
    """
    basis: Tensor = torch.linalg.qr(columns / _scale(columns)).Q
    if metric.gradient is None:
        return basis
    gram = (basis.double().T @ metric.times_gradient(basis).double()).cpu()
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    keep = values > torch.finfo(basis.dtype).eps * values[-1:].clamp_min(0)
    basis = basis @ (vectors[:, keep] / values[keep].sqrt()).to(basis)
    return basis


def _largest(side: Tensor | None) -> float:
    """Largest entry of a PSD side, which is on its diagonal; 1 for the identity and for zeros."""
    if side is None or side.numel() == 0:
        return 1.0
    return float((side if side.ndim == 1 else side.diagonal()).max()) or 1.0


def _divided(side: Tensor | None, by: float) -> Tensor | None:
    return None if side is None else side / by


def _scale(columns: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return lengths.clamp_min(torch.finfo(columns.dtype).tiny)


def _empty(matrix: Tensor) -> ColumnSpace:
    wide = matrix.double()
    return ColumnSpace(wide[:, :0], wide[:0, :], wide.new_zeros(0))
