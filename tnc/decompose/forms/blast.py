"""BLAST by alternating least squares in ``G ⊗ H``, started at the truncated SVD, so never above it.

Each of the three factors enters the matrix linearly and block by block, so each block step is a small linear
least-squares problem with a closed solution (MATH.md section 4: a correction ``A⁺ · gradient`` with the normal
matrix A lowers the error by ``gradientᵀ A⁺ gradient``, also where A is singular).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.column_space import column_space
from tnc.decompose.forms.block_grid import BlockGrid, block, pseudo_inverse, spread
from tnc.decompose.forms.rank_choice import RankFamily, fit_size
from tnc.decompose.sizes import Size
from tnc.errors import check_matrix
from tnc.metric import Metric
from tnc.terms import Blast


def blast(
    weight: Tensor, rank: Size, *, blocks: tuple[int, int], metric: Metric | None = None, sweeps: int = 10,
    dtype: torch.dtype | None = None,
) -> Blast:  # fmt: skip
    """BLAST matrix ``left[a] diag(coupling[a, b]) right[b]``, fitted in the metric.

    The start is the best low-rank matrix of the same rank in the metric with all couplings 1; no step raises the
    error, so the result is never worse than `truncated_svd` of that rank, before the factors are rounded to
    ``dtype``.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: columns of every basis: an int or `Rank` in 0..min(weight.shape), `RelativeError` or `BitsPerWeight`.
        blocks: (out_blocks, in_blocks), divisors of the shape.
        metric: ``None`` is the plain Frobenius norm.
        sweeps: rounds over right, couplings and left.
        dtype: of the stored factors; ``None`` is the dtype of ``weight``.

    Raises:
        ShapeError: if the blocks do not divide the shape; lists the divisors.
        RankError: if the rank is out of range.
        BudgetError: if no rank meets the error or bit budget.
        NonFiniteError: if ``weight`` holds NaN or Inf.

    Cost: ``2 m n (m + n)`` flops and an eigenproblem of (rank) and of one block of G and H, a block and sweep.
    Source: Lee et al. 2024 (arXiv:2410.21262), equation 2; they use preconditioned gradient descent in the
    Frobenius norm (algorithm 2), here exact alternating steps in ``G ⊗ H``.
    """
    check_matrix(weight, "weight")
    metric = metric or Metric()
    grid = BlockGrid((weight.shape[0], weight.shape[1]), blocks)
    stored = dtype or weight.dtype
    per_rank = stored.itemsize * 8 * (sum(weight.shape) + blocks[0] * blocks[1])

    def fit(rank: int) -> Blast:
        factors = _descend(weight.double(), rank, grid, metric, sweeps)
        return Blast(factors.left.to(stored), factors.coupling.to(stored), factors.right.to(stored))

    family = RankFamily("blast", fit, lambda rank: rank * per_rank, min(weight.shape))
    found = fit_size(family, size=rank, weight=weight, metric=metric)
    assert isinstance(found, Blast)
    return found


@dataclass(eq=False)
class _State:
    """Factors in float64, and ``G E H`` of the error they leave (m, n)."""

    left: Tensor
    coupling: Tensor
    right: Tensor
    seen_error: Tensor


def _descend(weight: Tensor, rank: int, grid: BlockGrid, metric: Metric, sweeps: int) -> _State:
    state = _start(weight, rank, grid, metric)
    for _ in range(sweeps if rank else 0):
        for b in range(grid.blocks[1]):
            _improve_right(state, b, grid, metric)
        for a in range(grid.blocks[0]):
            _improve_couplings(state, a, grid, metric)
            _improve_left(state, a, grid, metric)
    return _balanced(state)


def _start(weight: Tensor, rank: int, grid: BlockGrid, metric: Metric) -> _State:
    space = column_space(weight, rank, metric)
    missing = rank - space.left.shape[1]
    left = torch.nn.functional.pad(space.left.double(), (0, missing))
    right = torch.nn.functional.pad(space.right.double(), (0, 0, 0, missing))
    seen_error = metric.times_gradient(metric.times_hessian(weight - left @ right))
    (outs, ins), (rows, columns) = grid.blocks, grid.block_shape
    return _State(
        left.reshape(outs, rows, rank),
        left.new_ones(outs, ins, rank),
        right.reshape(rank, ins, columns).transpose(0, 1).contiguous(),
        seen_error,
    )


def _improve_right(state: _State, b: int, grid: BlockGrid, metric: Metric) -> None:
    """Best ``right[b]``: it enters as ``tall @ right[b]`` in the columns of block b."""
    place = grid.columns(b)
    tall = (state.left * state.coupling[:, b].unsqueeze(1)).flatten(0, 1)  # (m, r)
    seen = metric.times_gradient(tall)
    step = pseudo_inverse(tall.T @ seen, tall.T @ state.seen_error[:, place])
    step = pseudo_inverse(block(metric.hessian, place), step.T).T
    state.right[b] += step
    state.seen_error -= seen @ spread(metric.hessian, place, step.T, grid.shape[1]).T


def _improve_left(state: _State, a: int, grid: BlockGrid, metric: Metric) -> None:
    """Best ``left[a]``: it enters as ``left[a] @ wide`` in the rows of block a."""
    place = grid.rows(a)
    wide = (state.right * state.coupling[a].unsqueeze(2)).transpose(0, 1).flatten(1)  # (r, n)
    seen = metric.times_hessian(wide)
    step = pseudo_inverse(wide @ seen.T, wide @ state.seen_error[place].T).T
    step = pseudo_inverse(block(metric.gradient, place), step)
    state.left[a] += step
    state.seen_error -= spread(metric.gradient, place, step, grid.shape[0]) @ seen


def _improve_couplings(state: _State, a: int, grid: BlockGrid, metric: Metric) -> None:
    """Best ``coupling[a, b]`` for each b in turn: r unknowns, normal matrix a Hadamard product of two Grams."""
    rows = grid.rows(a)
    outer = spread(metric.gradient, rows, state.left[a], grid.shape[0])  # (m, r)
    gram = state.left[a].T @ outer[rows]
    own = state.seen_error[rows].clone()
    moved = state.seen_error.new_zeros(
        outer.shape[1], grid.shape[1]
    )  # (r, n): what all steps together do to the inputs
    for b, right in enumerate(state.right):
        columns = grid.columns(b)
        inner = spread(metric.hessian, columns, right.T, grid.shape[1]).T  # (r, n)
        slope = ((state.left[a].T @ own[:, columns]) * right).sum(1)
        step = pseudo_inverse(gram * (right @ inner[:, columns].T), slope.unsqueeze(1))
        state.coupling[a, b] += step.squeeze(1)
        moved += step * inner
        own -= outer[rows] @ (step * inner)
    state.seen_error -= outer @ moved


def _balanced(state: _State) -> _State:
    """The same matrix with the three factors of every component equally long: 16-bit storage loses least."""
    a, c, b = state.left.norm(dim=(0, 1)), state.coupling.norm(dim=(0, 1)), state.right.norm(dim=(0, 2))
    alive = (a > 0) & (b > 0) & (c > 0)
    size = torch.where(alive, (a * b).sqrt(), torch.ones_like(a))
    left = state.left * torch.where(alive, size / a, 1.0)
    right = state.right * torch.where(alive, size / b, 1.0).unsqueeze(1)
    return _State(left, state.coupling, right, state.seen_error)
