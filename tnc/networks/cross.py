"""Cross approximation: a matrix product operator from a few of the entries of a matrix.

Pivots are added at every bond in turn (`tnc.networks.pivots`) until there are enough of them or the error is small
enough, and the interpolation on them is rounded to the bonds asked for. With two cores this is adaptive cross
approximation (Bebendorf 2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tnc.errors import BudgetError
from tnc.networks.entries import EntrySource, Probe
from tnc.networks.modes import Modes, check_pair, rank_bounds
from tnc.networks.pivots import CrossPivots
from tnc.networks.rounding import round_mpo
from tnc.networks.tt_svd import MaxRank, check_eps, check_ranks, padding_notes
from tnc.terms import Mpo

_SEARCHED, _ROUNDED = 0.5, 0.8  # shares of eps for the interpolation and for rounding it


@dataclass(frozen=True, eq=False)
class CrossFit:
    """An operator fitted to some entries of a matrix, and an estimate of its error on the others.

    Attributes:
        mpo: the operator as stored.
        error: estimate of the relative Frobenius error, from entries (or products) read afterwards.
        standard_error: of that estimate; 0 where all of the matrix was read for it.
        reads: entries read, or products taken where the source is an operator, the estimates included.
        pivots: rows and columns of the cross at each of the d - 1 bonds, before rounding.
        notes: what was done otherwise than one might expect.
    """

    mpo: Mpo
    error: float
    standard_error: float
    reads: int
    pivots: tuple[int, ...]
    notes: tuple[str, ...]


def mpo_cross(
    source: EntrySource, out_modes: Sequence[int], in_modes: Sequence[int], *, max_rank: MaxRank = None,
    eps: float | None = None, dtype: torch.dtype = torch.float32, oversample: float = 0.5, seed: int = 0,
) -> CrossFit:  # fmt: skip
    """A matrix product operator of a matrix that is never held, from ``O(Σ r_{k-1} o_k i_k r_k)`` of its entries.

    More pivots are taken than the bonds asked for, and the operator is rounded to them: interpolation alone is a few
    times worse than truncation at the same bonds. Modes (m, 1) x (1, n) make it a low-rank factorization from rows and
    columns. Nothing that reads some of the entries can see a large one at a place of its own: the error is an estimate.

    Args:
        source: `Entries` of a function of the indices, or `OperatorEntries` of a map and its adjoint. Reading one row
            of an unfolding of a map takes as many products as the first input mode, so balanced modes are better
            served by `tt_svd_of_operator`.
        out_modes: d output modes; more than the rows is padding, which is zero and not read.
        in_modes: d input modes.
        max_rank: one limit for all bonds, or d - 1 limits.
        eps: relative Frobenius error, as estimated, at which to stop; that it was not reached is a note.
        dtype: of the stored cores.
        oversample: pivots beyond ``max_rank``, as a share of it.
        seed: of every random place.

    Raises:
        BudgetError: without ``max_rank`` and ``eps``, for ``eps`` outside [0, 1) or a negative ``oversample``.
        ShapeError: if the modes do not fit (lists factorizations that do), or the source returns another shape.
        RankError: as in `tt_svd_with_report`.
        NonFiniteError: if an entry is NaN or Inf.

    Cost: ``O(Σ o_k i_k r³)`` flops a pivot and bond, float64. Memory: the cores.
    Source: greedy cross interpolation, Savostyanov 2014 (arXiv:1305.1818); several pivots a sweep and random starts of
        the search, Dolgov and Savostyanov 2020 (arXiv:1903.11554). Rounding from more pivots is ours.
    """
    if (max_rank is None and eps is None) or oversample < 0:
        raise BudgetError(
            f"mpo_cross(max_rank={max_rank}, eps={eps}, oversample={oversample}): expected max_rank, eps or both, and "
            "oversample >= 0; without a limit every entry would be read."
        )
    outs, ins = check_pair(source.shape, out_modes, in_modes)
    limits = check_ranks(max_rank, outs, ins, "mpo_cross")
    share = None if eps is None else check_eps(eps, "mpo_cross")
    bounds = rank_bounds(outs, ins)
    goals = [min(limit + round(oversample * limit), bound) for limit, bound in zip(limits, bounds, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    cross, probe = CrossPivots(source, outs, ins, generator), source.probe(generator)
    notes = padding_notes(source.shape, outs, ins)
    if cross.start(probe.worst()):
        _grow(cross, goals, probe, None if share is None else _SEARCHED * share)
        found = _rounded(cross.mpo(), limits, None if share is None else _ROUNDED * share)
    else:
        found = Mpo(tuple(torch.zeros(1, o, i, 1, dtype=torch.float64) for o, i in zip(outs, ins, strict=True)))
        notes.append("every entry read was zero")
    stored = Mpo(tuple(core.to(dtype).contiguous() for core in found.cores), source.shape)
    fresh = source.probe(generator)
    estimate = fresh.error(stored)
    if share is not None and estimate.error > share:
        notes.append(f"the estimated error, {estimate.error:.3g}, is above eps={eps} with max_rank={max_rank}")
    reads = cross.reads + probe.cost + fresh.cost
    return CrossFit(stored, estimate.error, estimate.standard_error, reads, cross.ranks[1:-1], tuple(notes))


def _rounded(mpo: Mpo, limits: Modes, eps: float | None) -> Mpo:
    """Bonds within the limits, and within ``eps`` where it is given."""
    if eps is None and all(rank <= limit for rank, limit in zip(mpo.ranks[1:-1], limits, strict=True)):
        return mpo
    return round_mpo(mpo, max_rank=limits, eps=eps)


def _grow(cross: CrossPivots, goals: list[int], probe: Probe, share: float | None) -> None:
    """Add a pivot at every bond below its goal until all are there, none is found, or the error is within ``share``.

    A search at one bond sees what its neighbours' pivots let it see. Where all of them find nothing, the place at
    which the operator is farthest off in the probe becomes a pivot of every bond.
    """
    checked = 0
    while open_bonds := [bond for bond, goal in enumerate(goals, 1) if cross.ranks[bond] < goal]:
        if not sum(cross.add_pivot(bond) for bond in open_bonds):
            place = probe.worst(cross.mpo())
            if not sum(cross.add_place(bond, place) for bond in open_bonds):
                return
        if share is not None and (largest := max(cross.ranks)) > 1.1 * checked:
            checked = largest
            if probe.error(cross.mpo()).error <= share:
                return
