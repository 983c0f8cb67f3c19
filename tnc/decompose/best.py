"""Several recipes tried on one layer, and the one that held-out tokens prefer kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tnc.decompose.engine import Decomposition, decompose
from tnc.decompose.recipes import Recipe
from tnc.decompose.report import LayerReport
from tnc.errors import BudgetError, FormatError
from tnc.stats import LayerStats


def decompose_by(weight: Tensor, recipe: Recipe, stats: LayerStats | None) -> Decomposition:
    """Factor ``weight`` as a recipe says; of its candidates, if it has any, the best within its bits.

    Best is the least predicted nats on held-out tokens, the least held-out error where there are no gradients, the
    least error where there are no held-out tokens. Earlier candidates are preferred: a later one must undercut the
    best so far by more than ``recipe.margin``, since the least of many uncertain prices is the luckiest. The report's
    ``choices`` name the winner and all others with their price, and its ``seconds`` are those of all candidates.

    Raises:
        BudgetError: if no candidate fits the layer within the bits.
        NonFiniteError, ShapeError, StatsError, ...: as `decompose`.
    """
    if not recipe.candidates:
        return decompose(weight, recipe.stages, stats, sweeps=recipe.sweeps, transforms=recipe.transforms)
    found: list[tuple[str, Decomposition]] = []
    refused: list[str] = []
    for candidate in recipe.candidates:
        try:
            each = decompose_by(weight, candidate, stats)
        except (BudgetError, FormatError) as error:  # a group size that does not divide, a rank that does not fit
            refused.append(f"{candidate.name}: {error}")
            continue
        if recipe.limit is None or each.report.bits_per_weight <= recipe.limit.value:
            found.append((candidate.name, each))
    if not found:
        raise BudgetError(
            f"none of {len(recipe.candidates)} candidates of recipe {recipe.name!r} fits weight {tuple(weight.shape)} "
            f"within {recipe.limit}; ask for more bits. {' '.join(refused[:1])}"
        )
    name, best = found[0]
    for other, each in found[1:]:
        if price(each.report) < (1 - recipe.margin) * price(best.report):
            name, best = other, each
    choices = (*best.report.choices, f"best of {len(found)}: {name}", _tally(found))
    seconds = sum(each.report.seconds for _, each in found)
    return replace(best, report=replace(best.report, seconds=seconds, choices=choices))


def price(report: LayerReport) -> float:
    """What candidates are compared by: nats, held-out error or error, the first that is known."""
    known = (report.predicted_nats, report.heldout_relative_error, report.relative_error)
    return next(value for value in known if value is not None)


def _tally(found: Sequence[tuple[str, Decomposition]]) -> str:
    rows = ((name, price(each.report), each.report.bits_per_weight) for name, each in found)
    return ", ".join(f"{name} {cost:.4g} at {bits:.3f} b" for name, cost, bits in rows)
