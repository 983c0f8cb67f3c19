"""Block-term form: a sum of Tucker terms over the mode tensor, between CP (blocks of rank 1) and Tucker (one block).

Terms start one after another, each by orthogonal iteration on what those before it leave over; all of them are then
refined together in the metric (`tnc.decompose.refine`), which never raises the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.decompose.forms.mode_tensors import tucker, tucker_entries
from tnc.decompose.forms.rank_choice import RankFamily, fit_size
from tnc.decompose.refine import refine
from tnc.decompose.sizes import Size
from tnc.errors import RankError, check_matrix
from tnc.metric import Metric
from tnc.networks import exact_modes
from tnc.networks.modes import Modes
from tnc.terms import Expression, Sum, cast, dense64


def block_term(
    weight: Tensor, rank: Size, *, terms: int = 4, cores: int = 2, modes: tuple[Modes, Modes] | None = None,
    metric: Metric | None = None, sweeps: int = 2, dtype: torch.dtype | None = None,
) -> Sum:  # fmt: skip
    """Sum of ``terms`` Tucker terms of equal ranks.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: of the largest mode in every term, as in `tucker`; 0 is the zero matrix.
        terms: at least 2; one is `tucker`.
        cores: modes on each side where none are given.
        modes: as in `tucker`.
        metric: ``None`` is the plain Frobenius norm.
        sweeps: of alternating least squares over all terms in the metric.
        dtype: of the stored tensors; ``None`` is the dtype of ``weight``.

    Raises:
        RankError: for fewer than two terms.
        ShapeError, RankError, BudgetError, NonFiniteError: as in `tucker`.

    Cost: ``terms`` starts of `tucker`, then `refine`.
    Source: De Lathauwer 2008, Decompositions of a higher-order tensor in block terms, parts II and III; the start and
    the metric are ours.
    """
    check_matrix(weight, "weight")
    if terms < 2:
        raise RankError(f"block_term(terms={terms}) has no sum; use at least 2 terms, or tnc.decompose.forms.tucker.")
    shape = weight.shape[0], weight.shape[1]
    outs, ins = (exact_modes(shape[0], cores), exact_modes(shape[1], cores)[::-1]) if modes is None else modes
    legs = (*outs, *ins)
    stored = (dtype or weight.dtype).itemsize * 8

    def fit(rank: int) -> Expression:
        found: list[Expression] = []
        residual = weight.double()
        for _ in range(terms):
            found.append(tucker(residual, rank, modes=(outs, ins), sweeps=0, dtype=torch.float64))
            residual = residual - dense64(found[-1])
        start = Sum(tuple(found))
        return cast(refine(weight, start, metric or Metric(), sweeps=sweeps) if rank else start, dtype or weight.dtype)

    family = RankFamily("block_term", fit, lambda rank: terms * tucker_entries(legs, rank) * stored, max(legs))
    found = fit_size(family, rank, weight, metric or Metric())
    assert isinstance(found, Sum)
    return found
