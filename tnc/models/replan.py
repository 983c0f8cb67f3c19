"""Planning on the way: after each block the rest of the budget is spent again, on what is known by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tnc.decompose import Recipe
from tnc.errors import StatsError
from tnc.planning import (
    Budget,
    CurveTable,
    ErrorCurve,
    LayerCurves,
    Option,
    Plan,
    Rules,
    describe_budget,
    measure_layers,
    plan_curves,
)
from tnc.stats import LayerStats


class Replanner:
    """A plan that is made anew for every block, for ``compress(model, Replanner(...), batches, sequential=True)``.

    The curves of a block are measured again behind the compressed blocks before it; finished layers keep what they
    took, later ones are planned with the curves given, and the budget holds for all of them together.

    Args:
        curves: of the dense model, from `tnc.error_curves`.
        budgets: as in `tnc.plan`.
        rules: as in `tnc.plan`.

    Raises:
        BudgetError: from `compress`, if the budget cannot be met any more: error budgets can be lost on the way.

    Cost: the curves of every layer once more, and one planning run a block.
    """

    def __init__(self, curves: CurveTable, budgets: Budget | Sequence[Budget], rules: Rules | None = None) -> None:
        self._table = curves
        self._budgets = tuple(budgets) if isinstance(budgets, Sequence) else (budgets,)
        self._rules = rules
        self.plan: Plan = plan_curves(curves, self._budgets, rules)  # the last one made

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the planned layers."""
        return tuple(self._table.layers)

    def describe(self) -> str:
        """The budget on one line."""
        return f"replanned({', '.join(map(describe_budget, self._budgets))})"

    def check_layers(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelError` unless the curves are of a model with these layers and shapes."""
        self.plan.check_layers(shapes)

    def recipes_of(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats | None], dtype: torch.dtype | None
    ) -> dict[str, Recipe]:
        """Measure the block, plan it with what is left, and fix its choices."""
        portfolio = self._table.portfolio
        known = {name: each for name, each in stats.items() if each is not None}
        if len(known) < len(stats):
            raise StatsError("a Replanner measures each block; pass batches to compress, with sequential=True.")
        for name, curves in measure_layers(weights, known, portfolio, dtype=dtype):
            self._set(name, curves)
        self.plan = plan_curves(self._table, self._budgets, self._rules)
        for name in weights:
            self._set(name, _only(self._table.layers[name], self.plan, name))
        return {name: portfolio.recipe(self.plan.layers[name].choice, dtype) for name in weights}

    def check_layer(self, name: str, report: Mapping[str, Any]) -> None:
        """The guarantee of an error budget, see `Plan.check_layer`."""
        self.plan.check_layer(name, report)

    def _set(self, name: str, curves: LayerCurves) -> None:
        self._table = replace(self._table, layers={**self._table.layers, name: curves})


def _only(layer: LayerCurves, plan: Plan, name: str) -> LayerCurves:
    """The layer with the planned option alone."""
    choice = plan.layers[name].choice
    option: Option = next(each for each in layer.options if each.choice == choice)
    return replace(layer, curves=(ErrorCurve(choice.base, choice.factors, (option,), choice.shared),))
