"""Certified lower bounds: how small the error of a form and size can be at all.

For ``base + low rank`` the bound is the Eckart–Young tail of the residual of that base; for a matrix product
operator the largest tail of an unfolding (`tnc.networks.mpo_lower_bound`); for a quantized
matrix it holds for every assignment of codes on that grid (`tnc.quant.grid_lower_bound`). Rotations, permutations
and scalings around the form are taken as given: the bound is that of the inner problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.column_space import spectrum
from tnc.decompose.form_bound import form_bound
from tnc.decompose.peel import peel
from tnc.decompose.structure import rank_of
from tnc.metric import Metric
from tnc.networks import mpo_lower_bound
from tnc.quant import grid_lower_bound
from tnc.terms import Blast, BlockLowRank, Chain, Expression, Mpo, Quantized, Sum, dense64

# The exact spectrum of a wider layer (smaller side) takes minutes; its bound is left at 0 with a note.
SPECTRUM_LIMIT = 8192


def lower_bound(weight: Tensor, operator: Expression, metric: Metric) -> tuple[float, str | None]:
    """Smallest error, in ``metric``, of any operator of the same form and size on the same base or grid.

    Args:
        weight: (out_features, in_features).
        operator: a leaf, or a sum of a base and low-rank terms or one structured term, wrapped or not.
        metric: input-side metric in which the error is reported.

    Returns:
        The bound (absolute, not squared, its float64 rounding taken off), and a note where no bound better
        than 0 was computed.

    Cost: an eigenproblem of the smaller side (low rank; of every unfolding, MPO), of H (quantized), or of the blocks
    (structured forms).
    """
    inner = peel(weight, operator, metric)
    if inner is None:
        return 0.0, "lower bound not computed: the outputs are scaled"
    weight, operator, metric = inner.weight, inner.operator, inner.metric
    rank, rest = _split_ranks(operator)
    if rank is not None:
        if min(weight.shape) > SPECTRUM_LIMIT:
            return 0.0, f"lower bound not computed: smaller side above {SPECTRUM_LIMIT}"
        residual = weight - sum(dense64(t) for t in rest)
        tail = float(spectrum(residual, metric)[rank:].square().sum())
        return max(tail - _rounding(residual, metric), 0.0) ** 0.5, None
    if isinstance(operator, Mpo | Chain):
        return mpo_lower_bound(weight, operator if isinstance(operator, Mpo) else operator.mpo(), metric)
    if isinstance(operator, Quantized):
        identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
        hessian = identity if metric.hessian is None else metric.hessian
        return grid_lower_bound(weight, operator, hessian) ** 0.5, None
    structured, rest = _split(operator, BlockLowRank, Blast)
    if structured is not None:
        residual = weight - sum(dense64(t) for t in rest)
        return max(form_bound(residual, structured, metric) - _rounding(residual, metric), 0.0) ** 0.5, None
    return 0.0, None


def _rounding(residual: Tensor, metric: Metric) -> float:
    """Rounding of the float64 Gram matrix behind `spectrum`, squared units: what a tail of zeros may look like."""
    h = 1.0 if metric.hessian is None else float(metric.hessian.double().norm())
    return sum(residual.shape) * torch.finfo(torch.float64).eps * float(residual.norm()) ** 2 * h


def _split(operator: Expression, *kinds: type[Expression]) -> tuple[Expression | None, tuple[Expression, ...]]:
    """The one term of these kinds in an operator and the other terms; (None, ()) if there is not exactly one."""
    terms = operator.terms if isinstance(operator, Sum) else (operator,)
    found = [t for t in terms if isinstance(t, kinds)]
    if len(found) != 1:
        return None, ()
    return found[0], tuple(t for t in terms if t is not found[0])


def _split_ranks(operator: Expression) -> tuple[int | None, tuple[Expression, ...]]:
    """Rank of all low-rank terms of an operator together, ``None`` without any, and the other terms."""
    terms = operator.terms if isinstance(operator, Sum) else (operator,)
    ranks = [rank for t in terms if (rank := rank_of(t)) is not None]
    return (sum(ranks) if ranks else None), tuple(t for t in terms if rank_of(t) is None)
