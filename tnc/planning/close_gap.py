"""What is left of a gap, closed: only options that a better choice could take go to HiGHS.

At any multiplier λ the least prices ``Σ min (cost + λ usage) − λ limit`` bound every choice from below (MATH.md section
5), and an option whose price is r above the least of its unit raises the bound of all choices that take it by r. Where
that is above the cost of the choice at hand, no better choice takes the option. At the multiplier of the hull few
options are left, and branch and cut over them takes milliseconds where over all of them it takes seconds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tnc.errors import BudgetError
from tnc.planning.allocate import Allocation, Floats, Integers, Menu
from tnc.planning.exact import Limit, allocate_exactly

_ROUNDING = 1e-9  # of the cost: options this little too dear are kept, and a gap this small is closed


def close_gap(
    menu: Menu, limit: float, found: Allocation, *, group: Integers | None = None, scheme: Integers | None = None,
    seconds: float = 60.0,
) -> Allocation:  # fmt: skip
    """The choice at hand or a better one, with a bound at least as high.

    Args:
        menu: the options.
        limit: of the usage.
        found: a choice within the limit, its multiplier that of the hull.
        group: (layers,) as in `allocate_exactly`.
        scheme: (options,) the same.
        seconds: after which the search stops; what it has proven until then is in the bound.

    Returns:
        The allocation, with the multiplier of ``found``.
    """
    if found.gap <= _ROUNDING * abs(found.cost):
        return found
    if group is None or scheme is None:
        group, scheme = np.arange(menu.units), np.zeros(len(menu.cost), dtype=np.int64)
    kept = worth_looking_at(menu, limit, found, group, scheme)
    if len(kept) == menu.units:
        return replace(found, lower_bound=found.cost)
    first = np.searchsorted(kept, menu.first)
    least_cost, least_usage = (np.minimum.reduceat(each[kept], first[:-1]) for each in (menu.cost, menu.usage))
    unit = menu.unit[kept]
    part = Menu(first, menu.cost[kept] - least_cost[unit], menu.usage[kept] - least_usage[unit])
    rest = Limit(part.usage, limit - least_usage.sum())
    try:
        better = allocate_exactly(part, [rest], group=group, scheme=scheme[kept], seconds=seconds)
    except BudgetError:  # none was found in time
        return found
    chosen = kept[better.chosen]
    cost, usage = float(menu.cost[chosen].sum()), float(menu.usage[chosen].sum())
    proven = max(found.lower_bound, better.lower_bound + float(least_cost.sum()))
    if cost >= found.cost or usage > limit:
        return replace(found, lower_bound=min(proven, found.cost))
    return Allocation(chosen, cost, usage, min(proven, cost), found.multiplier)


def worth_looking_at(menu: Menu, limit: float, found: Allocation, group: Integers, scheme: Integers) -> Integers:
    """Positions of the options that a choice better than ``found`` could take, and of those that it takes."""
    price = menu.cost + found.multiplier * menu.usage
    least, total = _least_prices(menu, price, group, scheme)
    best = total.min(1)
    extra = total[group[menu.unit], scheme] - least[menu.unit, scheme] + price - best[group[menu.unit]]
    bound = best.sum() - found.multiplier * limit
    kept = bound + extra <= found.cost + _ROUNDING * abs(found.cost)
    kept[found.chosen] = True
    return np.flatnonzero(kept)


def _least_prices(menu: Menu, price: Floats, group: Integers, scheme: Integers) -> tuple[Floats, Floats]:
    """(layers, schemes) least price of a layer in a scheme, infinite where it lacks it; (groups, schemes) the same."""
    least = np.full((menu.units, int(scheme.max()) + 1), np.inf)
    np.minimum.at(least, (menu.unit, scheme), price)
    total = np.zeros((int(group.max()) + 1, least.shape[1]))
    np.add.at(total, group, least)
    return least, total
