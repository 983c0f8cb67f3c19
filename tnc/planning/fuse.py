"""Units of several layers that must agree: a fused kernel runs q, k and v, or all experts, in one scheme.

The options of a fused unit are, scheme by scheme, the vertices of the Minkowski sum of its members' hulls: the same
segments in the same order that the knapsack would take, so nothing that a multiplier can choose is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tnc.errors import BudgetError
from tnc.planning.allocate import Floats, Integers, Menu, lower_hulls, spend_rest


@dataclass(frozen=True, eq=False)
class FusedMenu:
    """A menu whose units are groups of layers.

    Attributes:
        menu: options of the groups.
        choices: for every option of ``menu`` the options of its layers in the menu it was made from, in layer order.
    """

    menu: Menu
    choices: list[Integers]

    def layers(self, chosen: Integers) -> Integers:
        """Options of all layers, in layer order, for options of all groups."""
        options = np.concatenate([self.choices[option] for option in chosen])
        return np.sort(options)  # options of a menu are in layer order


def fuse(menu: Menu, group: Integers, scheme: Integers) -> FusedMenu:
    """Merge the layers of a group into one unit whose members all take options of one scheme.

    Args:
        menu: options of single layers.
        group: (layers,) the group of each layer, numbered from 0; a group of one layer keeps all its options.
        scheme: (options,) the scheme of each option.

    Raises:
        BudgetError: if the layers of a group have no scheme in common.

    Cost: O(options · log).
    """
    hulls = _scheme_hulls(menu, scheme)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    costs: list[Floats] = []
    usages: list[Floats] = []
    choices: list[Integers] = []
    for layers in members:
        if len(layers) == 1:
            single = np.arange(menu.first[layers[0]], menu.first[layers[0] + 1])
            rows = single[:, None]
        else:
            rows = _agreeing(menu, hulls, layers)
        costs.append(menu.cost[rows].sum(1))
        usages.append(menu.usage[rows].sum(1))
        choices += list(rows)
    first = np.concatenate([[0], np.cumsum([len(c) for c in costs])])
    return FusedMenu(Menu(first, np.concatenate(costs), np.concatenate(usages)), choices)


def spend_rest_agreeing(menu: Menu, chosen: Integers, limit: float, group: Integers, scheme: Integers) -> Integers:
    """`spend_rest` layer by layer, within the scheme that the group of a layer has taken.

    Hull vertices are all that a fused unit offers; between them a single layer may still take what is left.

    Args:
        menu: options of single layers.
        chosen: (layers,) one option each, agreeing in each group.
        limit: of the usage.
        group: (layers,) as in `fuse`.
        scheme: (options,) as in `fuse`.
    """
    single = np.bincount(group)[group] == 1
    kept = np.flatnonzero(single[menu.unit] | (scheme == scheme[chosen][menu.unit]))
    first = np.searchsorted(kept, menu.first)
    part = Menu(first, menu.cost[kept], menu.usage[kept])
    found: Integers = kept[spend_rest(part, np.searchsorted(kept, chosen), limit)]
    return found


def _scheme_hulls(menu: Menu, scheme: Integers) -> dict[int, dict[int, Integers]]:
    """Hull vertices by layer and scheme."""
    order = np.lexsort((np.arange(len(scheme)), scheme, menu.unit))
    pair = np.stack([menu.unit[order], scheme[order]])
    begins = np.concatenate([[True], (pair[:, 1:] != pair[:, :-1]).any(0)])
    first = np.concatenate([np.flatnonzero(begins), [len(order)]])
    vertices = lower_hulls(Menu(first, menu.cost[order], menu.usage[order]))
    owner = np.repeat(np.arange(len(first) - 1), np.diff(first))[vertices]
    parts = np.split(order[vertices], np.flatnonzero(np.diff(owner)) + 1)
    found: dict[int, dict[int, Integers]] = {}
    for layer, each, part in zip(*pair[:, begins].tolist(), parts, strict=True):
        found.setdefault(layer, {})[each] = part
    return found


def _agreeing(menu: Menu, hulls: dict[int, dict[int, Integers]], layers: Integers) -> Integers:
    """(options, members) choices of a group, scheme by scheme."""
    common = sorted(set.intersection(*(set(hulls[layer]) for layer in layers.tolist())))
    if not common:
        raise BudgetError(
            f"layers {layers.tolist()} must take one scheme and have none in common; widen the portfolio so that one "
            "of its formats fits all of them."
        )
    return np.concatenate([_minkowski(menu, [hulls[layer][s] for layer in layers.tolist()]) for s in common])


def _minkowski(menu: Menu, hulls: list[Integers]) -> Integers:
    """(vertices, members) of the sum of the members' hulls."""
    member = np.concatenate([np.full(len(h) - 1, i) for i, h in enumerate(hulls)])
    before, after = (np.concatenate([h[part] for h in hulls]) for part in (slice(None, -1), slice(1, None)))
    rate = (menu.cost[before] - menu.cost[after]) / (menu.usage[after] - menu.usage[before])
    rows = np.empty((len(after) + 1, len(hulls)), dtype=np.int64)
    rows[0] = [h[0] for h in hulls]
    for k, at in enumerate(np.lexsort((np.arange(len(after)), -rate))):
        rows[k + 1] = rows[k]
        rows[k + 1, member[at]] = after[at]
    return rows
