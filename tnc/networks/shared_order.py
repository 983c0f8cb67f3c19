"""One order of rows for several weights: the neurons of an MLP, which are rows of gate and up and columns of down.

The search is that of `tnc.networks.site_order` with the errors of all weights added up, so it lowers their sum, and an
order that no layer has to store costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]
from torch import Tensor

from tnc.errors import ShapeError, check_matrix
from tnc.metric import Metric
from tnc.networks.modes import Modes, check_pair
from tnc.networks.site_order import scaled_by, spectral_order
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
    given = torch.arange(len(scaled[0]))
    before, _ = _errors(weights, scaled, given)
    best = SharedOrder(given, before, before, "given")
    for name, order in (("given", given), ("spectral", spectral_order(sum(s @ s.T for s in scaled)))):  # type: ignore[arg-type]
        for _ in range(rounds):
            after, fitted = _errors(weights, scaled, order)
            if after < best.after:
                best = SharedOrder(order, before, after, name)
            alike = sum(f @ s.T for f, s in zip(fitted, scaled, strict=True))  # places x rows
            order = torch.from_numpy(linear_sum_assignment(alike.numpy(), maximize=True)[1])  # type: ignore[union-attr]
    return best


def _errors(weights: Sequence[Rows], scaled: Sequence[Tensor], order: Tensor) -> tuple[float, list[Tensor]]:
    """The relative error of all together in an order, and what stands for each weight there."""
    fitted = [
        dense64(tt_svd(s[order], *each.modes, max_rank=each.rank)) for each, s in zip(weights, scaled, strict=True)
    ]
    squared = sum(float((s[order] - f).square().sum()) for s, f in zip(scaled, fitted, strict=True))
    size = sum(float(s.square().sum()) for s in scaled)
    return (squared / (size or 1.0)) ** 0.5, fitted
