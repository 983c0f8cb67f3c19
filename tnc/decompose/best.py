"""Several recipes tried on one layer, and the one that held-out tokens prefer kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tnc.decompose.engine import Decomposition, decompose
from tnc.decompose.known_fits import KnownFits
from tnc.decompose.recipes import Recipe
from tnc.decompose.report import LayerReport
from tnc.decompose.stages import QuantizeStage
from tnc.errors import BudgetError, FormatError
from tnc.stats import LayerStats

_REFINED = 0.6  # share of its price that refinement leaves at least: .66 seen after nearest codes, .8 after two-sided

_Tried = list[tuple[str, Decomposition]]


def decompose_by(
    weight: Tensor, recipe: Recipe, stats: LayerStats | None, *, known: KnownFits | None = None
) -> Decomposition:
    """Factor ``weight`` as a recipe says; of its candidates, if it has any, the best within its bits.

    Best is the least predicted nats on held-out tokens, the least held-out error where there are no gradients, the
    least error where there are no held-out tokens. Earlier candidates are preferred: a later one must undercut the best
    so far by more than ``recipe.margin``, since the least of many uncertain prices is the luckiest.

    What candidates have in common, transforms and first stages, is computed once and kept in ``known``. A candidate
    that refines its codes is made without refinement first, and refined only where 40 % off its price would make it
    the best so far. The report's ``choices`` name the winner and all others with their price, and its ``seconds`` are
    those of all candidates.

    Raises:
        BudgetError: if no candidate fits the layer within the bits.
        NonFiniteError, ShapeError, StatsError, ...: as `decompose`.
    """
    if not recipe.candidates:
        return decompose(weight, recipe.stages, stats, sweeps=recipe.sweeps, transforms=recipe.transforms, known=known)
    known = known or KnownFits(weight, stats)
    found: _Tried = []
    hopeless: _Tried = []  # left unrefined
    refused: list[str] = []
    for candidate in recipe.candidates:
        try:
            if found and (plain := _unrefined(candidate)) is not None:
                rough = decompose_by(weight, plain, stats, known=known)
                if not _REFINED * price(rough.report) < (1 - recipe.margin) * price(_best(found, recipe)[1].report):
                    hopeless.append((candidate.name, rough))
                    continue
            each = decompose_by(weight, candidate, stats, known=known)
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
    name, best = _best(found, recipe)
    choices = (*best.report.choices, f"best of {len(found) + len(hopeless)}: {name}", _tally(found))
    if hopeless:
        choices = (*choices, f"too far to be refined: {_tally(hopeless)}")
    seconds = sum(each.report.seconds for _, each in (*found, *hopeless))
    return replace(best, report=replace(best.report, seconds=seconds, choices=choices))


def price(report: LayerReport) -> float:
    """What candidates are compared by: nats, held-out error or error, the first that is known."""
    known = (report.predicted_nats, report.heldout_relative_error, report.relative_error)
    return next(value for value in known if value is not None)


def _best(found: _Tried, recipe: Recipe) -> tuple[str, Decomposition]:
    """The last that undercuts the best before it by the margin."""
    name, best = found[0]
    for other, each in found[1:]:
        if price(each.report) < (1 - recipe.margin) * price(best.report):
            name, best = other, each
    return name, best


def _unrefined(recipe: Recipe) -> Recipe | None:
    """The recipe without refinement of its codes; ``None`` if it has none."""
    stages = tuple(replace(s, refine=0) if isinstance(s, QuantizeStage) else s for s in recipe.stages)
    return None if stages == recipe.stages else replace(recipe, stages=stages)


def _tally(found: Sequence[tuple[str, Decomposition]]) -> str:
    rows = ((name, price(each.report), each.report.bits_per_weight) for name, each in found)
    return ", ".join(f"{name} {cost:.4g} at {bits:.3f} b" for name, cost, bits in rows)
