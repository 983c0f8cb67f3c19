"""Rounding: the same operator with smaller bonds (Oseledets 2011, algorithm 2), never through the matrix."""

from __future__ import annotations

from dataclasses import replace

from tnc.errors import BudgetError
from tnc.networks.algebra import without_padding
from tnc.networks.canonical import right_canonical
from tnc.networks.truncate import split
from tnc.networks.tt_svd import MaxRank, check_eps, check_ranks
from tnc.terms import Mpo


def round_mpo(mpo: Mpo, *, max_rank: MaxRank = None, eps: float | None = None) -> Mpo:
    """A matrix product operator with smaller bonds, by rank, by relative tolerance, or by both.

    ``||A - round(A)|| <= eps ||A||`` in the Frobenius norm, before the cores are rounded to their dtype; by rank
    the squared error is at most d - 1 times the best with these ranks. Rounding twice changes nothing more.

    Args:
        mpo: any operator; not changed.
        max_rank: one limit for all bonds, or d - 1 limits.
        eps: relative error allowed, in [0, 1).

    Returns:
        An operator of the same shape, modes and dtype.

    Raises:
        BudgetError: if neither limit is given, or ``eps`` is out of range.
        RankError: as in `tt_svd`.

    Cost: a QR sweep and an SVD sweep, ``O(Σ o_k i_k r³)`` in float64.
    """
    if max_rank is None and eps is None:
        raise BudgetError("round_mpo needs max_rank, eps, or both; it would change nothing.")
    limits = check_ranks(max_rank, mpo.out_modes, mpo.in_modes, "round_mpo")
    dtype = mpo.cores[0].dtype
    centred = right_canonical(without_padding(mpo))
    cores = list(centred.cores)
    left = None if eps is None else (check_eps(eps, "round_mpo") * float(cores[0].norm())) ** 2
    for k, limit in enumerate(limits):
        before, out, into, _ = cores[k].shape
        allowed = None if left is None else left / (len(limits) - k)
        step = split(cores[k].flatten(0, 2), limit, allowed)
        cores[k] = step.basis.reshape(before, out, into, -1)
        cores[k + 1] = (step.rest @ cores[k + 1].flatten(1)).reshape(-1, *cores[k + 1].shape[1:])
        left = None if left is None else max(left - float(step.tail), 0.0)
    return replace(mpo, cores=tuple(core.to(dtype).contiguous() for core in cores))
