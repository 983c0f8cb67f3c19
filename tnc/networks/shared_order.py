"""One order of rows for several weights: the neurons of an MLP, which are rows of gate and up and columns of down.

The search is that of `tnc.networks.site_order` with the errors of all weights added up, so it lowers their sum, and an
order that no layer has to store costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from tnc.errors import ShapeError, check_matrix
from tnc.metric import Metric
from tnc.networks.modes import Modes, check_pair
from tnc.networks.site_order import assigned, best_order, scaled_by, spectral_order
from tnc.networks.tt_svd import tt_svd
from tnc.terms import dense64


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight whose rows are to move with those of others.

    Attributes:
        weight: (rows, columns), any float dtype; a layer whose columns move is given transposed.
        rank: bond dimension of its two-core operator.
        modes: (row modes, column modes) of the two cores.
        metric: whose diagonals scale the weight; of a transposed layer with its sides exchanged.
    """

    weight: Tensor
    rank: int
    modes: tuple[Modes, Modes]
    metric: Metric = field(default_factory=Metric)


@dataclass(frozen=True, eq=False)
class SharedOrder:
    """An order of rows that several weights share.

    Attributes:
        rows: row ``rows[i]`` of every weight comes to place i.
        before: relative error of all two-core operators together in the given order, scaled Frobenius norm.
        after: the same in this order, at most ``before``.
        start: where the winning search began: ``given`` or ``spectral``.
    """

    rows: Tensor
    before: float
    after: float
    start: str


def shared_order(weights: Sequence[Rows], *, rounds: int = 3) -> SharedOrder:
    """Search an order of rows in which the two-core operators of all weights together err less.

    Args:
        weights: at least one, with equally many rows.
        rounds: alternations from each start.

    Raises:
        ShapeError: for no weights, unequal numbers of rows, or modes that do not fit.
        NonFiniteError, RankError: as `tt_svd`.

    Cost: a TT-SVD of every weight and an assignment of all rows, ``O(m³)``, a round and start.
    """
    if not weights or len({len(each.weight) for each in weights}) != 1:
        sizes = [len(each.weight) for each in weights]
        raise ShapeError(f"shared_order got weights with {sizes} rows; expected one or more with equally many.")
    for each in weights:
        check_matrix(each.weight, "weight")
        check_pair((each.weight.shape[0], each.weight.shape[1]), *each.modes)
    scaled = [scaled_by(each.weight.double(), each.metric) for each in weights]
    size = sum(float(s.square().sum()) for s in scaled) or 1.0

    def fit(order: Tensor) -> tuple[float, list[Tensor]]:
        moved = [s[order] for s in scaled]
        fitted = [dense64(tt_svd(m, *each.modes, max_rank=each.rank)) for each, m in zip(weights, moved, strict=True)]
        squared = sum(float((m - f).square().sum()) for m, f in zip(moved, fitted, strict=True))
        return (squared / size) ** 0.5, fitted

    def assign(_: Tensor, fitted: list[Tensor]) -> Tensor:
        return assigned(reduce(torch.add, (f @ s.T for f, s in zip(fitted, scaled, strict=True))))

    spectral = spectral_order(reduce(torch.add, (s @ s.T for s in scaled)))
    found = best_order(torch.arange(len(scaled[0]), device=scaled[0].device), spectral, fit, assign, rounds)
    return SharedOrder(found.order, found.before, found.after, found.start)
