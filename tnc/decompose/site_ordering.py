"""`SiteOrdering`: rows and columns in an order in which a matrix product operator errs less, stored and counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.decompose.mpo_stage import MpoStage
from tnc.decompose.sizes import Size
from tnc.decompose.transforms import InputPermutation, OutputPermutation, Transformed, apply_transforms, unwrapped
from tnc.metric import Metric
from tnc.networks.site_order import site_order
from tnc.stats import LayerStats

_STORED = torch.float16  # of a number of the operator that the search aims at


@dataclass(frozen=True)
class SiteOrdering:
    """The order that `tnc.networks.site_order.site_order` finds: ``W' = P W Qᵀ``, ``Ŵ = Pᵀ Ŵ' Q``.

    P and Q are stored as indices. Where no order is better than the given one nothing is stored; the report says so.

    Attributes:
        rank: of the two-core operator that the search aims at; `BitsPerWeight` counts 16 bits a number.
        rounds: alternations from each start.
    """

    rank: Size
    rounds: int = 3

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The permuted problem.

        Raises:
            BudgetError, RankError, ShapeError: as `MpoStage.bond` with two cores.
        """
        shape = (weight.shape[0], weight.shape[1])
        stage = MpoStage(self.rank)
        metric = Metric() if stats is None else Metric.auto(stats)
        rank = stage.bond(shape, _STORED)
        found = site_order(weight, rank, metric=metric, modes=stage.modes(shape), rounds=self.rounds)
        if found.after >= found.before:
            return Transformed(weight.double(), stats, unwrapped, choices=("site order: no better one found",))
        moves = OutputPermutation(tuple(found.rows.tolist())), InputPermutation(tuple(found.columns.tolist()))
        said = f"site order from {found.start}: {found.before:.4f} to {found.after:.4f} at bond {rank}, diagonal metric"
        return replace(apply_transforms(weight, moves, stats), choices=(said,))
