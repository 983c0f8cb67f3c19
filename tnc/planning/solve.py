"""From error curves and budgets to a plan: which options are allowed, what is minimised, what is bounded, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tnc.decompose import BitsPerWeight, RelativeError
from tnc.errors import BudgetError
from tnc.planning.allocate import Allocation, Floats, Front, Integers, Menu, front
from tnc.planning.budget import Budget, Bytes, Latency, Nats, PerplexityIncrease, Speedup, bits_within, describe_budget
from tnc.planning.close_gap import close_gap
from tnc.planning.constraints import Constraint, LargestError, allowed_options
from tnc.planning.curve_table import CurveTable
from tnc.planning.curves import Option
from tnc.planning.exact import Limit, allocate_exactly
from tnc.planning.fuse import fuse, spend_rest_agreeing
from tnc.planning.latency import LatencyTable
from tnc.planning.plan import LayerPlan, Plan
from tnc.planning.portfolio import Choice

FEW_LAYERS = 256
"""Up to as many the gap of a plan is closed without being asked."""

QUICK = 1.0
"""Seconds that this may take; what is proven until then is in the certificate."""


@dataclass(frozen=True, eq=False)
class Clock:
    """What latency budgets are counted by.

    Attributes:
        table: measured on the device that will serve.
        tokens: in one call: 1 is decoding.
    """

    table: LatencyTable
    tokens: int = 1


@dataclass(frozen=True)
class Rules:
    """How a plan may be made.

    Attributes:
        constraints: filters on options, all of which hold.
        fused: layers that see one input take one base, as fused kernels need.
        weights: multiples of the predicted nats by layer name: 1 where absent. What measuring layers alone says of
            them is one (`tnc.models.probes`). Routed experts need none, their G counts how often the router chooses
            them.
        clock: for latency and speedup budgets.
        exact: close the gap however many layers there are; up to `FEW_LAYERS` it is closed anyway, within `QUICK`
            seconds.
        seconds: that HiGHS may take where ``exact``, or several limits, ask for it.
    """

    constraints: tuple[Constraint, ...] = ()
    fused: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    clock: Clock | None = None
    exact: bool = False
    seconds: float = 60.0


def plan_curves(
    table: CurveTable, budgets: Budget | Sequence[Budget], rules: Rules | None = None, *, scale: float = 1.0
) -> Plan:
    """The plan of least error within the budgets, or of least bits within an error.

    Args:
        table: error curves of the model.
        budgets: one or several; all hold. With only size and time budgets the error is minimised; with `Nats`,
            `PerplexityIncrease` or `RelativeError` alone, or beside time budgets, the bits are.
        rules: constraints, fused groups, weights, clock.
        scale: measured over predicted nats, for `Nats` and `PerplexityIncrease`.

    Returns:
        The plan with its certificate. Without gradients the objective is the sum of squared relative errors, a proxy
        that says nothing of nats.

    Raises:
        BudgetError: if a budget is outside what the options reach (says the interval), budgets or constraints
            contradict (names them), or a latency budget has no clock.

    Cost: seconds for 10,000 layers of 200 options; no weights are touched.
    """
    wanted = (budgets,) if not isinstance(budgets, Sequence) else tuple(budgets)
    if not wanted:
        raise BudgetError("a plan needs at least one budget, for example BitsPerWeight(3.5).")
    return Problem.of(table, wanted, rules or Rules(), scale).solve()


def plan_of(table: CurveTable, choices: Mapping[str, Choice], rules: Rules | None = None) -> Plan:
    """The plan of given choices, with what they store and cost; it has no budget.

    Args:
        table: error curves of the model.
        choices: of every layer.
        rules: their weights count.

    Raises:
        BudgetError: for a layer without a choice, or a choice that was not measured.
    """
    problem = Problem.of(table, (), Rules(weights={} if rules is None else rules.weights), 1.0)
    found = []
    for at, name in enumerate(table.layers):
        place = range(problem.first[at], problem.first[at + 1])
        these = [i for i in place if problem.options[i].choice == choices.get(name)]
        if not these:
            said = choices[name].describe() if name in choices else "none"
            raise BudgetError(f"layer {name!r} has the choice {said}; expected one of the {len(place)} in its curves.")
        found += these[:1]
    menu, chosen = Menu(problem.first, problem.error, problem.bits), np.array(found)
    cost, usage = float(problem.error[chosen].sum()), float(problem.bits[chosen].sum())
    return problem.explained(menu, Allocation(chosen, cost, usage, cost, 0.0), problem.objective)


@dataclass(frozen=True, eq=False)
class Problem:
    """One planning problem as arrays over options."""

    table: CurveTable
    budgets: tuple[Budget, ...]
    rules: Rules
    scale: float
    options: list[Option]
    first: Integers
    objective: str
    error: Floats
    bits: Floats
    seconds: Floats | None

    @classmethod
    def of(cls, table: CurveTable, budgets: tuple[Budget, ...], rules: Rules, scale: float) -> Problem:
        """Filter the options and lay them out."""
        bounds = tuple(LargestError(b.value) for b in budgets if isinstance(b, RelativeError))
        allowed = allowed_options(table.layers, (*rules.constraints, *bounds))
        options = [option for each in allowed.values() for option in each]
        first = np.concatenate([[0], np.cumsum([len(each) for each in allowed.values()])])
        weight = np.repeat([rules.weights.get(name, 1.0) for name in allowed], np.diff(first))
        nats = np.array([o.heldout_nats for o in options])
        objective = "relative" if np.isnan(nats).any() else "nats"
        error = weight * (nats if objective == "nats" else np.array([o.heldout_error for o in options]) ** 2)
        bits = np.array([o.bits for o in options], dtype=np.float64)
        seconds = None if rules.clock is None else _seconds(rules.clock, table, allowed)
        return cls(table, budgets, rules, scale, options, first, objective, error, bits, seconds)

    def solve(self) -> Plan:
        """Choose and explain."""
        limits = [limit for budget in self.budgets for limit in self._limits(budget)]
        errors = [limit for limit in limits if limit.name == "error"]
        least_bits = bool(errors) or not limits
        cost = self.bits if least_bits else self.error
        usage = limits[0].usage if len(limits) == 1 else np.zeros_like(cost)
        value = limits[0].value if len(limits) == 1 else 0.0
        menu = Menu(self.first, cost, usage)
        group, scheme = self._agreement or (None, None)
        if len(limits) > 1:
            found = allocate_exactly(menu, limits, group=group, scheme=scheme, seconds=self.rules.seconds)
        else:
            found = self._lagrangian(menu, value)
            if self.rules.exact or menu.units <= FEW_LAYERS:
                seconds = self.rules.seconds if self.rules.exact else min(QUICK, self.rules.seconds)
                found = close_gap(menu, value, found, group=group, scheme=scheme, seconds=seconds)
        return self.explained(menu, found, "bits" if least_bits else self.objective)

    def front(self) -> Front:
        """The whole trade-off of error against bits, with the fused groups as units."""
        menu = Menu(self.first, self.error, self.bits)
        return front(menu if self._agreement is None else fuse(menu, *self._agreement).menu)

    def _lagrangian(self, menu: Menu, limit: float) -> Allocation:
        if self._agreement is None:
            return front(menu).allocate(limit)
        group, scheme = self._agreement
        fused = fuse(menu, group, scheme)
        found = front(fused.menu).allocate(limit)
        chosen = spend_rest_agreeing(menu, fused.layers(found.chosen), limit, group, scheme)
        cost, usage = float(menu.cost[chosen].sum()), float(menu.usage[chosen].sum())
        return Allocation(chosen, cost, usage, min(found.lower_bound, cost), found.multiplier)

    @cached_property
    def _agreement(self) -> tuple[Integers, Integers] | None:
        """(group of each layer, scheme of each option) that agree: one base of fused layers, one shared factor.

        A shared right factor is a scheme of its own, which all layers of a group take or none; of the other options
        all are one scheme, unless fused kernels ask for one base. ``None`` where nothing has to agree.
        """
        names, fused = list(self.table.layers), self.rules.fused
        sharing = {names[at] for at, option in zip(self._layer_of, self.options, strict=True) if option.choice.shared}
        groups = [group for group in self.table.groups if fused or sharing.intersection(group)]
        if not groups:
            return None
        leader = {name: group[0] for group in groups for name in group}
        numbers = {name: at for at, name in enumerate(dict.fromkeys(leader.get(n, n) for n in names))}
        schemes = {base: at if fused else 0 for at, base in enumerate(self.table.portfolio.bases)}
        sharers = dict.fromkeys(o.choice for o in self.options if o.choice.shared)
        shared = {choice: len(schemes) + at for at, choice in enumerate(sharers)}
        scheme = [shared[o.choice] if o.choice.shared else schemes[o.choice.base] for o in self.options]
        return np.array([numbers[leader.get(n, n)] for n in names]), np.array(scheme)

    @property
    def _layer_of(self) -> Integers:
        """(options,) the layer of each option."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    def _limits(self, budget: Budget) -> list[Limit]:
        """What a budget bounds; nothing for `RelativeError`, which filters options."""
        elements = self.table.elements
        if isinstance(budget, RelativeError):
            return []
        if isinstance(budget, BitsPerWeight):
            limit = Limit(self.bits, float(bits_within(budget.value, elements)), "bits")
            return [self._checked(budget, limit, lambda bits: f"{bits / elements:.4f} bits per weight")]
        if isinstance(budget, Bytes):
            other = self.table.other_bytes
            limit = Limit(self.bits, float(budget.bits - 8 * other), "bits")
            return [self._checked(budget, limit, lambda bits: f"{int(bits) // 8 + other:,} bytes")]
        if isinstance(budget, Nats | PerplexityIncrease):
            return [self._error_limit(budget)]
        return [self._time_limit(budget)]

    def _error_limit(self, budget: Nats | PerplexityIncrease) -> Limit:
        if self.objective != "nats":
            raise BudgetError(
                f"{describe_budget(budget)} is in nats, and these curves were measured without gradients; calibrate "
                "with fisher=True, or use bpw=, bytes= or error=."
            )
        nats = budget.value if isinstance(budget, Nats) else budget.nats
        limit = Limit(self.error, nats / self.scale, "error")
        return self._checked(budget, limit, lambda value: f"{value * self.scale:.4g} nats")

    def _time_limit(self, budget: Latency | Speedup) -> Limit:
        if self.seconds is None or self.rules.clock is None:
            raise BudgetError(
                f"{describe_budget(budget)} needs measured times; make a table with tnc bench --table and pass it as "
                "Rules(clock=Clock(LatencyTable.load(...)))."
            )
        clock = self.rules.clock
        dense = sum(clock.table.dense_seconds(layer.shape, clock.tokens) for layer in self.table.layers.values())
        value = float(budget.value) if isinstance(budget, Latency) else dense / budget.value
        return self._checked(budget, Limit(self.seconds, value, "time"), lambda s: f"{1000 * s:.4g} ms")

    def _checked(self, budget: Budget, limit: Limit, words: Callable[[float], str]) -> Limit:
        """The limit, if the options reach it."""
        least = float(np.minimum.reduceat(limit.usage, self.first[:-1]).sum())
        most = float(np.maximum.reduceat(limit.usage, self.first[:-1]).sum())
        if limit.value < least:
            raise BudgetError(
                f"the budget {describe_budget(budget)} is below the smallest reachable: this portfolio reaches from "
                f"{words(least)} to {words(most)}. Ask for more, or widen the portfolio."
            )
        if isinstance(budget, BitsPerWeight | Bytes) and limit.value > most:
            raise BudgetError(
                f"the budget {describe_budget(budget)} is above the largest option everywhere: this portfolio reaches "
                f"from {words(least)} to {words(most)}. There is nothing to choose; leave the model dense."
            )
        return limit

    def explained(self, menu: Menu, found: Allocation, minimised: str) -> Plan:
        """An allocation as a plan: what every layer becomes, its share, and what came second."""
        value = float(self.error[found.chosen].sum())
        layers = {}
        for at, (name, layer) in enumerate(self.table.layers.items()):
            option = self.options[found.chosen[at]]
            share = float(self.error[found.chosen[at]]) / value if value > 0 else 0.0
            seconds = None if self.seconds is None else float(self.seconds[found.chosen[at]])
            nats = None if self.objective != "nats" else option.heldout_nats
            why = _why(self, menu, found, at)
            layers[name] = LayerPlan(option.choice, layer.shape, option.bits, nats, option.heldout_error, share,
                                     seconds, why, weight=self.rules.weights.get(name, 1.0))  # fmt: skip
        notes = _notes(self.table)
        if minimised == "bits":
            notes = (f"minimised bits: {found.cost:.0f}, at least {found.lower_bound:.0f}", *notes)
        if self.objective == "relative":
            notes = ("no gradients: the objective is the sum of squared relative errors, a proxy", *notes)
        return Plan(
            layers, self.table.portfolio, self.budgets, self.objective, found.cost if minimised == "bits" else value,
            found.lower_bound, scale=self.scale, other_bytes=self.table.other_bytes, dtype=self.table.dtype,
            fingerprint=self.table.fingerprint, notes=notes,
        )  # fmt: skip


def _notes(table: CurveTable) -> tuple[str, ...]:
    """Notes of the layers' curves, the same note of several layers once."""
    found: dict[str, list[str]] = {}
    for name, layer in table.layers.items():
        for note in layer.notes:
            found.setdefault(note, []).append(name)
    return tuple(
        f"{names[0]}{f' and {len(names) - 1} more layers' if len(names) > 1 else ''}: {note}"
        for note, names in found.items()
    )


def _seconds(clock: Clock, table: CurveTable, allowed: Mapping[str, tuple[Option, ...]]) -> Floats:
    known: dict[tuple[tuple[int, int], object], float] = {}
    found = []
    for name, options in allowed.items():
        shape = table.layers[name].shape
        for option in options:
            key = (shape, option.choice)
            if key not in known:
                known[key] = clock.table.seconds(shape, option.choice, clock.tokens)
            found.append(known[key])
    return np.array(found)


def _why(problem: Problem, menu: Menu, found: Allocation, at: int) -> str:
    """The option of this layer that came second, and what it would have cost."""
    place = np.arange(problem.first[at], problem.first[at + 1])
    chosen = found.chosen[at]
    same = (problem.bits[place] == problem.bits[chosen]) & (problem.error[place] == problem.error[chosen])
    rest = place[(place != chosen) & ~same]
    if not len(rest):
        return "the only option allowed"
    multiplier = 0.0 if np.isnan(found.multiplier) else found.multiplier
    price = menu.cost[rest] + multiplier * menu.usage[rest]
    second = rest[np.lexsort((np.abs(menu.usage[rest] - menu.usage[chosen]), price))[0]]
    option, now = problem.options[second], problem.options[chosen]
    error = problem.error[second] - problem.error[chosen]
    unit = "nats" if problem.objective == "nats" else "squared relative error"
    return f"{option.choice.describe()}: {option.bits - now.bits:+d} bits, {error:+.3g} {unit}"
