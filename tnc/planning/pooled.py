"""Ranks and bonds of a whole model from one budget: components pooled by predicted nats per stored bit.

In ``G ⊗ H`` the squared singular values of all layers are in one unit, so a model-wide budget is spent on
the components with the largest ``½σ²`` per bit (MATH.md section 0). A layer whose rank would reach the
break-even ``m n / (m + n)`` is better stored densely: each layer's options are therefore the lower convex
hull of (bits, remaining nats) over its ranks *and* the dense point, and hull segments of all layers are
taken in order of slope (`tnc.planning.allocate`). What is left of the budget where no segment fits buys the ranks
between hull vertices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tnc.decompose.bond_curve import BondPoint
from tnc.errors import BudgetError
from tnc.planning.allocate import Menu, allocate
from tnc.planning.budget import bits_within

DENSE = None  # the choice of leaving a layer dense, in place of a rank


@dataclass(frozen=True, eq=False)
class PooledLayer:
    """What pooling needs to know of a layer.

    Attributes:
        sigma: singular values in the common metric, descending (min(m, n),).
        shape: (m, n).
        factor_bits: bits of one stored factor entry.
        dense_bits: bits of one entry when the layer is left dense.
    """

    sigma: Tensor
    shape: tuple[int, int]
    factor_bits: int = 16
    dense_bits: int = 16


@dataclass(frozen=True, eq=False)
class PooledBonds:
    """A layer as a matrix product operator: what its bonds buy.

    Attributes:
        points: of `tnc.decompose.MpoStage.curve`, the zero matrix among them.
        shape: (m, n).
        dense_bits: bits of one entry when the layer is left dense.
    """

    points: tuple[BondPoint, ...]
    shape: tuple[int, int]
    dense_bits: int = 16


Chosen = int | tuple[int, ...] | None
"""A rank, or the bonds of a matrix product operator; ``None`` leaves the layer dense."""


@dataclass(frozen=True)
class PooledPlan:
    """Ranks or bonds by layer, bits they store, predicted nats, and a bound no allocation beats."""

    ranks: dict[str, Chosen]
    storage_bits: int
    predicted_nats: float
    lower_bound_nats: float


def pooled_ranks(layers: Mapping[str, PooledLayer | PooledBonds], bits_per_weight: float) -> PooledPlan:
    """Spend ``bits_per_weight`` over all layers where it buys the most predicted nats.

    Args:
        layers: name -> `PooledLayer`, or `PooledBonds` for an operator of any number of cores.
        bits_per_weight: stored bits over dense elements, all layers together.

    Returns:
        The plan; ``storage_bits`` never exceeds the budget, ``lower_bound_nats`` is the Lagrangian bound.

    Raises:
        BudgetError: if the budget is not positive or there are no layers.

    Cost: O(total rank · log) time.
    """
    if not layers or not bits_per_weight > 0:
        raise BudgetError(f"pooled_ranks needs layers and a positive budget; got {len(layers)} and {bits_per_weight}.")
    points = [_points(layer) for layer in layers.values()]
    flat = [point for choices in points for point in choices]
    first = np.concatenate([[0], np.cumsum([len(choices) for choices in points])])
    menu = Menu(first, np.array([p.nats for p in flat]), np.array([p.bits for p in flat], dtype=np.float64))
    elements = sum(l.shape[0] * l.shape[1] for l in layers.values())
    found = allocate(menu, bits_within(bits_per_weight, elements))
    ranks = {name: flat[at].rank for name, at in zip(layers, found.chosen, strict=True)}
    return PooledPlan(ranks, int(found.usage), found.cost, found.lower_bound)


@dataclass(frozen=True)
class _Point:
    bits: int
    nats: float
    rank: Chosen


def _points(layer: PooledLayer | PooledBonds) -> list[_Point]:
    """Useful ranks and the dense layer by increasing bits; the remaining nats never rise."""
    rows, columns = layer.shape
    if isinstance(layer, PooledBonds):
        bonds = [_Point(point.bits, point.nats, point.bonds) for point in layer.points]
        return [*bonds, _Point(rows * columns * layer.dense_bits, 0.0, DENSE)]
    energy = 0.5 * layer.sigma.double() ** 2
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).tolist()
    per_rank = (rows + columns) * layer.factor_bits
    dense = rows * columns * layer.dense_bits
    ranks = [_Point(k * per_rank, tails[k], k) for k in range(len(tails)) if k * per_rank < dense]
    return [*ranks, _Point(dense, 0.0, DENSE)]
