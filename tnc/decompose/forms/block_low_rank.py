"""Block low rank and Monarch: the closed form of every block, then descent over blocks in ``G ⊗ H``.

Without correlations between blocks (H and G diagonal or absent) each block is its own truncated SVD, and the
whole is optimal: for Monarch this is the projection of Dao et al. 2022 (arXiv:2204.00595, section 3.3 and
algorithm 1), for any rank. With a full H (or G) blocks see each other. For fixed other blocks the error is

    ||C - T||² in (G_jj, H_kk) + const,   T = C_now + G_jj⁺ (G E H)_jk H_kk⁺,

so the best block of rank r is the truncated SVD of T in that metric: a step never raises the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tnc.column_space import Exact, column_space
from tnc.decompose.forms.block_grid import BlockGrid, block, couples_blocks, pseudo_inverse, spread
from tnc.decompose.forms.rank_choice import RankFamily, fit_size
from tnc.decompose.sizes import Size
from tnc.errors import check_matrix
from tnc.metric import Metric
from tnc.terms import BlockLowRank, Monarch

B = TypeVar("B", bound=BlockLowRank)
Factors = tuple[Tensor, Tensor]


def block_low_rank(
    weight: Tensor, rank: Size, *, blocks: tuple[int, int], metric: Metric | None = None, sweeps: int = 3,
    dtype: torch.dtype | None = None,
) -> BlockLowRank:  # fmt: skip
    """Blocks of consecutive rows and columns, each of low rank, fitted in the metric.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: of every block: an int or `Rank` in 0..min(block), `RelativeError` or `BitsPerWeight`.
        blocks: (out_blocks, in_blocks), divisors of the shape.
        metric: ``None`` is the plain Frobenius norm.
        sweeps: rounds of descent over the blocks where the metric couples them; the start is the truncated SVD
            of each block in its own part of the metric.
        dtype: of the stored factors; ``None`` is the dtype of ``weight``.

    Raises:
        ShapeError: if the blocks do not divide the shape; lists the divisors.
        RankError: if the rank is out of range.
        BudgetError: if no rank meets the error or bit budget.
        NonFiniteError: if ``weight`` holds NaN or Inf.

    Cost: an eigenproblem of the smaller side of each block a sweep, and ``2 m n (m + n)`` flops a block.
    Source: closed form by blocks as in arXiv:2204.00595; the coupled descent is derived above.
    """
    return _fit(BlockLowRank, weight, rank, blocks, metric or Metric(), sweeps, dtype)


def monarch(
    weight: Tensor, rank: Size, *, blocks: tuple[int, int], metric: Metric | None = None, sweeps: int = 3,
    dtype: torch.dtype | None = None,
) -> Monarch:  # fmt: skip
    """Block-diagonal times permutation times block-diagonal, fitted in the metric: `Monarch`.

    Arguments, errors and cost are those of `block_low_rank`; the output blocks are interleaved.

    Source: Dao et al. 2022 (arXiv:2204.00595): the projection of section 3.3, here for any rank, rectangular
    weights and in ``G ⊗ H``.
    """
    return _fit(Monarch, weight, rank, blocks, metric or Metric(), sweeps, dtype)


def _fit(
    cls: type[B], weight: Tensor, size: Size, blocks: tuple[int, int], metric: Metric, sweeps: int,
    dtype: torch.dtype | None,
) -> B:  # fmt: skip
    check_matrix(weight, "weight")
    grid = BlockGrid((weight.shape[0], weight.shape[1]), blocks)
    order = _row_order(cls, grid)
    dense, seen = weight.double()[order], Metric(metric.hessian, _reordered(metric.gradient, order))
    stored = dtype or weight.dtype
    per_rank = stored.itemsize * 8 * (blocks[1] * weight.shape[0] + blocks[0] * weight.shape[1])

    def fit(rank: int) -> B:
        left, right = fit_blocks(dense, rank, grid, seen, sweeps)
        return cls(left.to(stored), right.to(stored))

    family = RankFamily(cls.kind, fit, lambda rank: rank * per_rank, min(grid.block_shape))
    found = fit_size(family, size, weight, metric)
    assert isinstance(found, cls)
    return found


def _row_order(cls: type[BlockLowRank], grid: BlockGrid) -> Tensor:
    """Rows of the weight in the order of the blocks that hold them."""
    index = torch.arange(grid.shape[0])
    return index.reshape(-1, grid.blocks[0]).T.flatten() if issubclass(cls, Monarch) else index


def _reordered(side: Tensor | None, order: Tensor) -> Tensor | None:
    if side is None or side.ndim == 1:
        return None if side is None else side[order]
    return side[order][:, order]


@dataclass(eq=False)
class _State:
    """The current blocks (j, k) as (left, right), and ``G E H`` of the error they leave (m, n)."""

    parts: dict[tuple[int, int], Factors]
    seen_error: Tensor


def fit_blocks(weight: Tensor, rank: int, grid: BlockGrid, metric: Metric, sweeps: int) -> Factors:
    """Factors (out_blocks, rows, in_blocks, rank) and (in_blocks, out_blocks, rank, columns), float64."""
    places = [(j, k) for j in range(grid.blocks[0]) for k in range(grid.blocks[1])]
    start = {
        (j, k): _truncate(weight[grid.rows(j), grid.columns(k)], rank, _part(metric, grid, j, k)) for j, k in places
    }
    if rank == 0 or not couples_blocks(metric):
        return _stacked(start, grid, rank)
    state = _State(start, metric.times_gradient(metric.times_hessian(weight - _assembled(start, weight, grid))))
    for _ in range(sweeps):
        for j, k in places:
            _improve(state, j, k, rank, grid, metric)
    return _stacked(state.parts, grid, rank)


def _improve(state: _State, j: int, k: int, rank: int, grid: BlockGrid, metric: Metric) -> None:
    """Replace one block by the best of its rank for the others as they are."""
    part = _part(metric, grid, j, k)
    step = pseudo_inverse(part.gradient, state.seen_error[grid.rows(j), grid.columns(k)])
    step = pseudo_inverse(part.hessian, step.T).T
    before = state.parts[j, k][0] @ state.parts[j, k][1]
    after = _truncate(before + step, rank, part)
    change = after[0] @ after[1] - before
    seen = spread(metric.gradient, grid.rows(j), change, grid.shape[0])
    seen = spread(metric.hessian, grid.columns(k), seen.T, grid.shape[1]).T
    state.parts[j, k], state.seen_error = after, state.seen_error - seen


def _part(metric: Metric, grid: BlockGrid, j: int, k: int) -> Metric:
    return Metric(block(metric.hessian, grid.columns(k)), block(metric.gradient, grid.rows(j)))


def _truncate(matrix: Tensor, rank: int, metric: Metric) -> Factors:
    """Best factors of at most ``rank`` columns in the metric, each column as long as its row, zeros beyond the end."""
    space = column_space(matrix, rank, metric, Exact())
    a, b = space.left.norm(dim=0), space.right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), torch.ones_like(a))
    missing = rank - len(a)
    left = torch.nn.functional.pad(space.left * scale, (0, missing))
    return left, torch.nn.functional.pad(space.right / scale.unsqueeze(1), (0, 0, 0, missing))


def _assembled(parts: dict[tuple[int, int], Factors], like: Tensor, grid: BlockGrid) -> Tensor:
    dense = torch.zeros_like(like)
    for (j, k), (left, right) in parts.items():
        dense[grid.rows(j), grid.columns(k)] = left @ right
    return dense


def _stacked(parts: dict[tuple[int, int], Factors], grid: BlockGrid, rank: int) -> Factors:
    (rows, columns), (outs, ins) = grid.block_shape, grid.blocks
    left = torch.stack([left for left, _ in parts.values()]).reshape(outs, ins, rows, rank)
    right = torch.stack([right for _, right in parts.values()]).reshape(outs, ins, rank, columns)
    return left.transpose(1, 2).contiguous(), right.transpose(0, 1).contiguous()
