"""The multiple-choice knapsack: one option a unit, least total cost within a limit, with a certified lower bound.

``min Σ cost  s.t.  Σ usage ≤ limit``, one option for each unit (a layer, or layers that a kernel fuses). Only the
vertices of a unit's lower convex hull of (usage, cost) can be optimal for a multiplier, so the hull segments of all
units, taken in order of saving per usage, are the Lagrangian optimum; where the first segment does not fit, the part
of it that would fit gives a bound that no choice of options can beat (MATH.md section 5). Both directions of a budget
are this one problem: error within bits, or bits within an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tnc.errors import BudgetError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_ROUNDS = 64  # attempts to fit cheaper segments behind the first that does not fit


@dataclass(frozen=True, eq=False)
class Menu:
    """Options of several units, of which each takes exactly one.

    Attributes:
        first: (units + 1,) the options of unit u are ``first[u]`` to ``first[u + 1]``; every unit has at least one.
        cost: (options,) what is minimised, finite.
        usage: (options,) what the limit bounds, finite; integers up to 2**53 are summed exactly.
    """

    first: Integers
    cost: Floats
    usage: Floats

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.first) - 1

    @cached_property
    def unit(self) -> Integers:
        """(options,) the unit of each option."""
        return np.repeat(np.arange(self.units), np.diff(self.first))


@dataclass(frozen=True, eq=False)
class Allocation:
    """One option for each unit.

    Attributes:
        chosen: (units,) positions in the menu.
        cost: of the chosen options together.
        usage: of the chosen options together; at most the limit.
        lower_bound: no choice of options within the limit costs less.
        multiplier: cost that one unit of usage is worth at the optimum; 0 where the limit does not bind.
    """

    chosen: Integers
    cost: float
    usage: float
    lower_bound: float
    multiplier: float

    @property
    def gap(self) -> float:
        """How much this choice can be above the best one, ``cost - lower_bound``."""
        return self.cost - self.lower_bound


@dataclass(frozen=True, eq=False)
class Front:
    """The whole trade-off of a menu: what every limit buys, from one sort.

    Attributes:
        menu: the options.
        start: (units,) the option of least usage of each unit.
        step: (segments,) the option that a segment leads to, in order of saving per usage.
        usage: (segments + 1,) total usage after 0, 1, … segments.
        cost: (segments + 1,) total cost after 0, 1, … segments: the lower convex hull of all choices.
    """

    menu: Menu
    start: Integers
    step: Integers
    usage: Floats
    cost: Floats

    def allocate(self, limit: float) -> Allocation:
        """The best choice found within ``limit``: the Lagrangian one, then what still fits of the rest.

        Raises:
            BudgetError: if ``limit`` is below the least usage, or not a number.

        Cost: O(options) a round, at most a few hundred rounds where much is left over.
        """
        if not limit >= self.usage[0]:
            raise BudgetError(f"a limit of {limit:g} is below the least usage of all options, {self.usage[0]:g}.")
        taken = int(np.searchsorted(self.usage, limit, side="right")) - 1
        bound, multiplier = self._bound(taken, limit)
        chosen = self.start.copy()
        chosen[self.menu.unit[self.step[:taken]]] = self.step[:taken]  # later segments of a unit overwrite
        chosen = _take_what_fits(self.menu, chosen, self.step[taken:], limit)
        chosen = spend_rest(self.menu, chosen, limit)
        cost = float(self.menu.cost[chosen].sum())
        return Allocation(chosen, cost, float(self.menu.usage[chosen].sum()), min(bound, cost), multiplier)

    def _bound(self, taken: int, limit: float) -> tuple[float, float]:
        """Value of the linear relaxation, and its multiplier."""
        if taken == len(self.step):
            return float(self.cost[-1]), 0.0
        saving = (self.cost[taken] - self.cost[taken + 1]) / (self.usage[taken + 1] - self.usage[taken])
        bound = self.cost[taken] - saving * (limit - self.usage[taken])
        return float(bound), float(saving)


def front(menu: Menu) -> Front:
    """Sort the hull segments of all units by saving per usage.

    Raises:
        BudgetError: for a menu without units, a unit without options, or options that are not finite numbers.

    Cost: O(options · log) time; 10,000 units of 200 options in seconds.
    """
    _check(menu)
    vertices = lower_hulls(menu)
    same = menu.unit[vertices[1:]] == menu.unit[vertices[:-1]]
    before, after = vertices[:-1][same], vertices[1:][same]
    gain, price = menu.cost[before] - menu.cost[after], menu.usage[after] - menu.usage[before]
    order = np.lexsort((np.arange(len(after)), -gain / price))
    starts = vertices[np.concatenate([[True], ~same])]
    usage = menu.usage[starts].sum() + np.concatenate([[0.0], price[order].cumsum()])
    cost = menu.cost[starts].sum() - np.concatenate([[0.0], gain[order].cumsum()])
    return Front(menu, starts, after[order], usage, cost)


def allocate(menu: Menu, limit: float) -> Allocation:
    """`front` and its choice within ``limit``; keep the front where several limits are asked."""
    return front(menu).allocate(limit)


def reverse(menu: Menu) -> Menu:
    """The same options with cost and usage exchanged: least usage within a cost."""
    return replace(menu, cost=menu.usage, usage=menu.cost)


def lower_hulls(menu: Menu) -> Integers:
    """Positions of the vertices of every unit's lower convex hull, unit by unit, by rising usage and falling cost.

    Andrew's monotone chain, all units at a time; points on an edge are kept.
    """
    order = np.lexsort((menu.cost, menu.usage, menu.unit))
    counts = np.diff(menu.first)
    stack = np.zeros((menu.units, int(counts.max())), dtype=np.int64)
    height = np.zeros(menu.units, dtype=np.int64)
    for k in range(stack.shape[1]):
        units = np.flatnonzero(counts > k)
        option = order[menu.first[units] + k]
        cheaper = (height[units] == 0) | (menu.cost[option] < menu.cost[stack[units, height[units] - 1]])
        units, option = units[cheaper], option[cheaper]
        _pop_above(menu, stack, height, units, option)
        stack[units, height[units]] = option
        height[units] += 1
    found: Integers = stack[np.arange(stack.shape[1]) < height[:, None]]
    return found


def _pop_above(menu: Menu, stack: Integers, height: Integers, units: Integers, option: Integers) -> None:
    """Take vertices off the stacks of ``units`` that lie above the line to their new ``option``."""
    while True:
        deep = height[units] > 1
        units, option = units[deep], option[deep]
        if not len(units):
            return
        last, before = stack[units, height[units] - 1], stack[units, height[units] - 2]
        gained = (menu.cost[before] - menu.cost[last]) * (menu.usage[option] - menu.usage[last])
        to_gain = (menu.cost[last] - menu.cost[option]) * (menu.usage[last] - menu.usage[before])
        above = gained < to_gain
        units, option = units[above], option[above]
        height[units] -= 1


def _take_what_fits(menu: Menu, chosen: Integers, steps: Integers, limit: float) -> Integers:
    """Go on through the segments behind the first that does not fit; a unit that was passed over stays."""
    chosen = chosen.copy()
    for _ in range(_ROUNDS):
        if not len(steps):
            break
        rest = limit - menu.usage[chosen].sum()
        units = menu.unit[steps]
        price = menu.usage[steps] - menu.usage[_previous(chosen, steps, units)]
        kept = _before_first(price > rest, units, menu.units)
        steps, units, price = steps[kept], units[kept], price[kept]
        fits = int(np.searchsorted(price.cumsum(), rest, side="right"))
        chosen[units[:fits]] = steps[:fits]
        if fits == len(steps):
            break
        steps = steps[fits + 1 :][units[fits + 1 :] != units[fits]]
    return chosen


def _before_first(wrong: NDArray[np.bool_], units: Integers, count: int) -> NDArray[np.bool_]:
    """Whether no entry of the same unit up to this one is wrong."""
    first = np.full(count, len(wrong))
    at = np.flatnonzero(wrong)
    np.minimum.at(first, units[at], at)
    before: NDArray[np.bool_] = np.arange(len(wrong)) < first[units]
    return before


def _previous(chosen: Integers, steps: Integers, units: Integers) -> Integers:
    """For each segment the option it leaves: the segment of its unit before it, or the one chosen now."""
    order = np.argsort(units, kind="stable")
    grouped, sorted_units = steps[order], units[order]
    leaves = np.concatenate([[0], grouped[:-1]])
    begins = np.concatenate([[True], sorted_units[1:] != sorted_units[:-1]])
    leaves[begins] = chosen[sorted_units[begins]]
    previous = np.empty_like(steps)
    previous[order] = leaves
    return previous


def spend_rest(menu: Menu, chosen: Integers, limit: float) -> Integers:
    """Change one unit at a time, by the largest saving that fits within ``limit``, until nothing does.

    Savings only shrink while the rest is spent, so those of the first round stay upper bounds, and only the unit
    with the largest is looked at again.
    """
    chosen = chosen.copy()
    used = menu.usage[chosen]
    rest = limit - used.sum()
    cost = np.where(menu.usage <= (rest + used)[menu.unit], menu.cost, np.inf)
    saving = menu.cost[chosen] - np.minimum.reduceat(cost, menu.first[:-1])
    while True:
        unit = int(saving.argmax())
        if not saving[unit] > 0:
            return chosen
        now = chosen[unit]
        best = _cheapest_within(menu, unit, rest + menu.usage[now])
        found = menu.cost[now] - menu.cost[best]
        if found == saving[unit]:
            chosen[unit] = best
            rest = limit - menu.usage[chosen].sum()
            found = 0.0  # nothing cheaper fits into what is left now
        saving[unit] = found


def _cheapest_within(menu: Menu, unit: int, usage: float) -> int:
    """The option of least cost that uses at most ``usage``; of equals the one of least usage."""
    place = np.arange(menu.first[unit], menu.first[unit + 1])
    place = place[menu.usage[place] <= usage]
    return int(place[np.lexsort((menu.usage[place], menu.cost[place]))[0]])


def _check(menu: Menu) -> None:
    if menu.units < 1 or bool((np.diff(menu.first) < 1).any()):
        raise BudgetError(f"a menu of {menu.units} units needs at least one, each with at least one option.")
    if not (np.isfinite(menu.cost).all() and np.isfinite(menu.usage).all()):
        raise BudgetError("a menu has a cost or usage that is not finite; leave such options out.")
