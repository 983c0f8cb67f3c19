"""Ranks of a whole model from one budget: components pooled by predicted nats per stored bit.

In ``G ⊗ H`` the squared singular values of all layers are in one unit, so a model-wide budget is spent on
the components with the largest ``½σ²`` per bit (MATH.md section 0). A layer whose rank would reach the
break-even ``m n / (m + n)`` is better stored densely: each layer's options are therefore the lower convex
hull of (bits, remaining nats) over its ranks *and* the dense point, and hull segments of all layers are
taken in order of slope. That is the Lagrangian optimum of the multiple-choice knapsack. What is left of the
budget where no segment fits buys the ranks between hull vertices.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import BudgetError

DENSE = None  # the choice of leaving a layer dense, in place of a rank


@dataclass(frozen=True, eq=False)
class PooledLayer:
    """What pooling needs to know of a layer.

    Attributes:
        sigma: singular values in the common metric, descending (min(m, n),).
        shape: (m, n).
        factor_bits: bits of one stored factor entry.
        dense_bits: bits of one entry when the layer is left dense.
        rank_entries: entries stored a rank; ``None`` is m + n, those of two factors.
    """

    sigma: Tensor
    shape: tuple[int, int]
    factor_bits: int = 16
    dense_bits: int = 16
    rank_entries: int | None = None


@dataclass(frozen=True)
class PooledPlan:
    """Ranks by layer (``None``: leave dense), bits they store, predicted nats, and a bound no allocation beats."""

    ranks: dict[str, int | None]
    storage_bits: int
    predicted_nats: float
    lower_bound_nats: float


def pooled_ranks(layers: Mapping[str, PooledLayer], bits_per_weight: float) -> PooledPlan:
    """Spend ``bits_per_weight`` over all layers where it buys the most predicted nats.

    Args:
        layers: name -> `PooledLayer`.
        bits_per_weight: stored bits over dense elements, all layers together.

    Returns:
        The plan; ``storage_bits`` never exceeds the budget, ``lower_bound_nats`` is the Lagrangian bound.

    Raises:
        BudgetError: if the budget is not positive or there are no layers.

    Cost: O(total rank · log) time.
    """
    if not layers or not bits_per_weight > 0:
        raise BudgetError(f"pooled_ranks needs layers and a positive budget; got {len(layers)} and {bits_per_weight}.")
    elements = sum(l.shape[0] * l.shape[1] for l in layers.values())
    points = {name: _points(layer) for name, layer in layers.items()}
    hulls = {name: _hull(choices) for name, choices in points.items()}
    position = dict.fromkeys(layers, 0)
    queue = [(-_slope(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    spent, bound = 0, None
    while queue:
        slope, name = heapq.heappop(queue)
        hull, at = hulls[name], position[name]
        step = hull[at + 1].bits - hull[at].bits
        if (spent + step) / elements > bits_per_weight:  # in the unit of the budget: no rounding of its product
            left = sum(h[position[k]].nats for k, h in hulls.items())
            bound = left + slope * (bits_per_weight * elements - spent) if bound is None else bound  # slope < 0
            continue  # a cheaper segment of another layer may still fit
        position[name], spent = at + 1, spent + step
        if at + 2 < len(hull):
            heapq.heappush(queue, (-_slope(hull, at + 1), name))
    chosen = {name: hulls[name][at] for name, at in position.items()}
    chosen = _spend_rest(chosen, points, spent, lambda bits: bits / elements <= bits_per_weight)
    nats = sum(p.nats for p in chosen.values())
    lower = nats if bound is None else min(bound, nats)
    return PooledPlan({k: p.rank for k, p in chosen.items()}, sum(p.bits for p in chosen.values()), nats, lower)


@dataclass(frozen=True)
class _Point:
    bits: int
    nats: float
    rank: int | None


def _points(layer: PooledLayer) -> list[_Point]:
    """Useful ranks and the dense layer by increasing bits; the remaining nats never rise."""
    rows, columns = layer.shape
    energy = 0.5 * layer.sigma.double() ** 2
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).tolist()
    per_rank = (layer.rank_entries or rows + columns) * layer.factor_bits
    dense = rows * columns * layer.dense_bits
    ranks = [_Point(k * per_rank, tails[k], k) for k in range(len(tails)) if k * per_rank < dense]
    return [*ranks, _Point(dense, 0.0, DENSE)]


def _hull(points: list[_Point]) -> list[_Point]:
    """Lower convex hull of (bits, remaining nats), by increasing bits."""
    hull: list[_Point] = []
    for point in points:
        while len(hull) > 1 and _between(hull[-2], hull[-1]) < _between(hull[-1], point):
            hull.pop()
        if not hull or point.nats < hull[-1].nats:
            hull.append(point)
    return hull


def _spend_rest(
    chosen: dict[str, _Point], points: Mapping[str, list[_Point]], spent: int, fits: Callable[[int], bool]
) -> dict[str, _Point]:
    """Replace one layer's choice at a time, by the largest saving that fits, until nothing does."""
    chosen = dict(chosen)
    while True:
        best: tuple[float, str, _Point] | None = None
        for name, now in chosen.items():
            others = spent - now.bits
            point = _last_that_fits(points[name], lambda bits, others=others: fits(others + bits))  # type: ignore[misc]
            if point.nats < now.nats and (best is None or now.nats - point.nats > best[0]):
                best = (now.nats - point.nats, name, point)
        if best is None:
            return chosen
        _, name, point = best
        spent += point.bits - chosen[name].bits
        chosen[name] = point


def _last_that_fits(points: list[_Point], fits: Callable[[int], bool]) -> _Point:
    """The point of fewest nats that fits, by bisection; of equals the one of fewest bits."""
    at = max(bisect_left(points, True, key=lambda p: not fits(p.bits)) - 1, 0)
    while at > 0 and points[at - 1].nats == points[at].nats:
        at -= 1
    return points[at]


def _between(a: _Point, b: _Point) -> float:
    """Nats saved per bit from a to b."""
    return (a.nats - b.nats) / (b.bits - a.bits)


def _slope(hull: list[_Point], at: int) -> float:
    return _between(hull[at], hull[at + 1])
