"""Site order: which rows and columns of a weight stand where before a matrix product operator cuts it into modes.

The search alternates two exact steps on the weight scaled by the roots of diag(G) and diag(H): the best operator of
two cores for the order as it is (TT-SVD), and the best order for that operator, which is a linear assignment of
columns (and of rows) to the places they resemble. Neither raises the error. It starts from the given order and from
spectral orders by correlation, and the best of all wins, so that the result is never worse than doing nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]
from torch import Tensor

from tnc.errors import check_matrix
from tnc.metric import Metric
from tnc.networks.modes import check_pair, site_modes
from tnc.networks.tt_svd import tt_svd
from tnc.terms import dense64

Order = TypeVar("Order")
Fit = TypeVar("Fit")


@dataclass(frozen=True, eq=False)
class SiteOrder:
    """An order of rows and columns.

    Attributes:
        rows: (out_features,) row ``rows[i]`` of the weight comes to place i.
        columns: (in_features,) the same for columns.
        before: relative error of the two-core operator in the given order, in the scaled Frobenius norm.
        after: the same in this order, at most ``before``.
        start: where the winning search began: ``given`` or ``spectral``.
    """

    rows: Tensor
    columns: Tensor
    before: float
    after: float
    start: str


def site_order(
    weight: Tensor, rank: int, *, metric: Metric | None = None,
    modes: tuple[Sequence[int], Sequence[int]] | None = None, rounds: int = 5, rows: bool = True, columns: bool = True,
) -> SiteOrder:  # fmt: skip
    """Search an order of rows and columns in which a two-core operator of bond dimension ``rank`` errs less.

    Args:
        weight: (out_features, in_features), any float dtype.
        rank: bond dimension.
        metric: whose diagonals scale the weight; ``None`` is the plain Frobenius norm.
        modes: (out_modes, in_modes) of two cores; ``None`` balances them.
        rounds: alternations from each start.
        rows: whether rows may move.
        columns: whether columns may move.

    Raises:
        ShapeError, NonFiniteError, RankError: as `tt_svd`.

    Cost: a TT-SVD and an assignment of all columns and rows, ``O(n³ + m³)``, a round and start.
    """
    check_matrix(weight, "weight")
    metric = metric or Metric()
    shape = (weight.shape[0], weight.shape[1])
    outs, ins = site_modes(shape, 2) if modes is None else check_pair(shape, *modes)
    scaled = scaled_by(weight.double(), metric)
    size = float(scaled.norm()) or 1.0

    def fit(order: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
        moved = scaled[order[0]][:, order[1]]
        fitted = dense64(tt_svd(moved, outs, ins, max_rank=rank))
        return float((moved - fitted).norm()) / size, fitted

    def assign(order: tuple[Tensor, Tensor], fitted: Tensor) -> tuple[Tensor, Tensor]:
        """Columns, then rows, moved to the places of ``fitted`` that they resemble most."""
        row, column = order
        if columns:
            column = assigned(fitted.T @ scaled[row])
        if rows:
            row = assigned(fitted @ scaled[:, column].T)
        return row, column

    given = torch.arange(shape[0], device=weight.device), torch.arange(shape[1], device=weight.device)
    spectral = (
        spectral_order(scaled @ scaled.T) if rows else given[0],
        spectral_order(scaled.T @ scaled) if columns else given[1],
    )
    found = best_order(given, spectral, fit, assign, rounds)
    return SiteOrder(*found.order, found.before, found.after, found.start)


@dataclass(frozen=True, eq=False)
class BestOrder(Generic[Order]):
    """The best order of a search, the error of the given order, its own, and the start that led to it."""

    order: Order
    before: float
    after: float
    start: str


def best_order(
    given: Order, spectral: Order, fit: Callable[[Order], tuple[float, Fit]], assign: Callable[[Order, Fit], Order],
    rounds: int,
) -> BestOrder[Order]:  # fmt: skip
    """The best of the orders that alternating fits and assignments pass through from two starts.

    Args:
        given: kept where no order is better.
        spectral: the other start.
        fit: the error in an order, and what was fitted there.
        assign: the best order for what was fitted in another one.
        rounds: fits from each start.
    """
    first = fit(given)
    best = BestOrder(given, first[0], first[0], "given")
    for name, order in (("given", given), ("spectral", spectral)):
        for k in range(rounds):
            error, fitted = first if order is given else fit(order)
            if error < best.after:
                best = replace(best, order=order, after=error, start=name)
            if k + 1 < rounds:
                order = assign(order, fitted)
    return best


def scaled_by(weight: Tensor, metric: Metric) -> Tensor:
    """``diag(G)^½ W diag(H)^½``."""
    for axis, side in enumerate((metric.gradient, metric.hessian)):
        if side is not None:
            diagonal = side if side.ndim == 1 else side.diagonal()
            weight = weight * diagonal.to(weight.device, torch.float64).clamp_min(0).sqrt().unsqueeze(1 - axis)
    return weight


def spectral_order(gram: Tensor) -> Tensor:
    """Order by the Fiedler vector of the graph whose weights are absolute correlations."""
    length = gram.diagonal().clamp_min(0).sqrt()
    similar = gram.abs() / (length.unsqueeze(1) * length).clamp_min(1e-300)
    similar.fill_diagonal_(0)
    laplacian = torch.diag(similar.sum(1)) - similar
    fiedler = torch.linalg.eigh(laplacian).eigenvectors[:, min(1, len(gram) - 1)]
    return torch.argsort(fiedler)


def assigned(alike: Tensor) -> Tensor:
    """For each place the row or column that is put there, of (places, rows or columns): the most alike in total."""
    return torch.from_numpy(linear_sum_assignment(alike.cpu().numpy(), maximize=True)[1]).to(alike.device)
