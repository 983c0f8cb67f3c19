"""From error curves and budgets to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tnc.errors import BudgetError
from tnc.planning.allocate import Allocation, Menu, front
from tnc.planning.budget import Budget
from tnc.planning.close_gap import close_gap
from tnc.planning.curve_table import CurveTable
from tnc.planning.exact import allocate_exactly
from tnc.planning.explain import explained
from tnc.planning.fuse import fuse, spend_rest_agreeing
from tnc.planning.plan import Plan
from tnc.planning.portfolio import Choice
from tnc.planning.problem import Problem
from tnc.planning.rules import Rules

FEW_LAYERS = 256
"""Up to as many the gap of a plan is closed without being asked."""

QUICK = 1.0
"""Seconds that this may take; what is proven until then is in the certificate."""


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
    return _solve(Problem.of(table, wanted, rules or Rules(), scale))


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
    return explained(problem, menu, Allocation(chosen, cost, usage, cost, 0.0), problem.objective)


def _solve(problem: Problem) -> Plan:
    """Choose and explain."""
    limits = problem.limits()
    errors = [limit for limit in limits if limit.name == "error"]
    least_bits = bool(errors) or not limits
    cost = problem.bits if least_bits else problem.error
    usage = limits[0].usage if len(limits) == 1 else np.zeros_like(cost)
    value = limits[0].value if len(limits) == 1 else 0.0
    menu = Menu(problem.first, cost, usage)
    group, scheme = problem.agreement or (None, None)
    if len(limits) > 1:
        found = allocate_exactly(menu, limits, group=group, scheme=scheme, seconds=problem.rules.seconds)
    else:
        found = _lagrangian(problem, menu, value)
        if problem.rules.exact or menu.units <= FEW_LAYERS:
            seconds = problem.rules.seconds if problem.rules.exact else min(QUICK, problem.rules.seconds)
            found = close_gap(menu, value, found, group=group, scheme=scheme, seconds=seconds)
    return explained(problem, menu, found, "bits" if least_bits else problem.objective)


def _lagrangian(problem: Problem, menu: Menu, limit: float) -> Allocation:
    if problem.agreement is None:
        return front(menu).allocate(limit)
    group, scheme = problem.agreement
    fused = fuse(menu, group, scheme)
    found = front(fused.menu).allocate(limit)
    chosen = spend_rest_agreeing(menu, fused.layers(found.chosen), limit, group, scheme)
    cost, usage = float(menu.cost[chosen].sum()), float(menu.usage[chosen].sum())
    return Allocation(chosen, cost, usage, min(found.lower_bound, cost), found.multiplier)
