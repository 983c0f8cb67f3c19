"""An allocation as a plan that people read: what every layer becomes, its share of the error, and what came second."""

from __future__ import annotations

import numpy as np

from tnc.planning.allocate import Allocation, Menu
from tnc.planning.curve_table import CurveTable
from tnc.planning.plan import LayerPlan, Plan
from tnc.planning.problem import Problem


def explained(problem: Problem, menu: Menu, found: Allocation, minimised: str) -> Plan:
    """An allocation as a plan: what every layer becomes, its share, and what came second."""
    value = float(problem.error[found.chosen].sum())
    layers = {}
    for at, (name, layer) in enumerate(problem.table.layers.items()):
        option = problem.options[found.chosen[at]]
        share = float(problem.error[found.chosen[at]]) / value if value > 0 else 0.0
        seconds = None if problem.seconds is None else float(problem.seconds[found.chosen[at]])
        nats = None if problem.objective != "nats" else option.heldout_nats
        why = _why(problem, menu, found, at)
        layers[name] = LayerPlan(option.choice, layer.shape, option.bits, nats, option.heldout_error, share,
                                 seconds, why, weight=problem.rules.weights.get(name, 1.0))  # fmt: skip
    notes, table, weights = _notes(problem.table), problem.table, problem.rules.weights.values()
    if weights:
        notes = (f"predictions weighted by layer, {min(weights):.3g} to {max(weights):.3g}", *notes)
    if minimised == "bits":
        notes = (f"minimised bits: {found.cost:.0f}, at least {found.lower_bound:.0f}", *notes)
    if problem.objective == "relative":
        notes = ("no gradients: the objective is the sum of squared relative errors, a proxy", *notes)
    return Plan(
        layers, table.portfolio, problem.budgets, problem.objective, found.cost if minimised == "bits" else value,
        found.lower_bound, scale=problem.scale, other_bytes=table.other_bytes, dtype=table.dtype,
        fingerprint=table.fingerprint, notes=notes,
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
