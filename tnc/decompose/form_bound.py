"""Lower bounds for structured forms: what the ranks of their block rows and blocks make impossible."""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.column_space import spectrum
from tnc.metric import Metric
from tnc.terms import Blast, BlockLowRank, Expression, Monarch


def form_bound(weight: Tensor, term: Expression, metric: Metric) -> float:
    """Squared error, in an input-side metric, below any term of this kind, blocks and rank; 0 where none is known.

    A block row of BLAST has matrix rank at most r, one of a block grid with K columns at most K r: each has its
    Eckart–Young tail, and without G rows add. A single block (j, k) of rank r costs at least its tail in the Schur
    complement of H on the block, the least that the other blocks can leave. The larger of the two counts.

    Cost: an eigenproblem of the smaller side of every block row, and of every block.
    """
    if isinstance(term, Blast):
        return sum(_tail(rows, term.rank, metric) for rows in weight.double().chunk(term.blocks[0]))
    if isinstance(term, BlockLowRank):
        outs, ins = term.blocks
        ordered = weight.double()
        if isinstance(term, Monarch):
            ordered = ordered.reshape(-1, outs, weight.shape[1]).transpose(0, 1).flatten(0, 1)
        parts = _block_metrics(metric, ins, weight.shape[1])
        return sum(_row_bound(rows, term.rank, metric, parts) for rows in ordered.chunk(outs))
    return 0.0


def _row_bound(rows: Tensor, rank: int, metric: Metric, parts: list[Metric]) -> float:
    """Bound for one block row."""
    tails = [_tail(block, rank, part) for block, part in zip(rows.chunk(len(parts), 1), parts, strict=True)]
    if metric.hessian is None or metric.hessian.ndim == 1:
        return sum(tails)
    return max(*tails, _tail(rows, rank * len(parts), metric))


def _block_metrics(metric: Metric, count: int, size: int) -> list[Metric]:
    """For each block of columns, H on it after the best that all other columns can do: the Schur complement."""
    if metric.hessian is None:
        return [Metric()] * count
    H = metric.hessian.double()
    if H.ndim == 1:
        return [Metric(part) for part in H.chunk(count)]
    found = []
    for place in torch.arange(size).chunk(count):
        rest = torch.ones(size, dtype=torch.bool)
        rest[place] = False
        cross = H[place][:, rest]
        # on the CPU: elsewhere there is no driver for singular matrices
        solved = torch.linalg.lstsq(H[rest][:, rest].cpu(), cross.T.cpu(), driver="gelsd").solution.to(H.device)
        schur = H[place][:, place] - cross @ solved
        found.append(Metric((schur + schur.T) / 2))
    return found


def _tail(matrix: Tensor, rank: int, metric: Metric) -> float:
    return float(spectrum(matrix, metric)[rank:].square().sum())
