"""Several recipes tried on one layer, and the one that held-out tokens prefer kept."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tnc.decompose.engine import Attempt, Decomposition, attempt
from tnc.decompose.known_fits import KnownFits
from tnc.decompose.recipes import Recipe
from tnc.decompose.stages import QuantizeStage
from tnc.errors import BudgetError, FormatError
from tnc.stats import LayerStats

_REFINED = 0.6  # share of its price that refinement leaves at least: .66 seen after nearest codes, .8 after two-sided

_Tried = list[tuple[str, Attempt]]


def decompose_by(weight: Tensor, recipe: Recipe, stats: LayerStats | None) -> Decomposition:
    """Factor ``weight`` as a recipe says; of its candidates, if it has any, the best within its bits.

    Best is the least predicted nats on held-out tokens, the least held-out error where there are no gradients, the
    least error where there are no held-out tokens. Earlier candidates are preferred: a later one must undercut the best
    so far by more than ``recipe.margin``, since the least of many uncertain prices is the luckiest.

    What candidates have in common, transforms and first stages, is computed once, and only the winner is measured. A
    candidate that refines its codes is made without refinement first, and refined only where 40 % off its price would
    make it the best so far. The report's ``choices`` name the winner and all others with their price, and its
    ``seconds`` are those of all candidates.

    Raises:
        BudgetError: if no candidate fits the layer within the bits.
        NonFiniteError, ShapeError, StatsError, ...: as `decompose`.
    """
    return attempt_by(weight, recipe, KnownFits.of(weight, stats)).measured()


def attempt_by(weight: Tensor, recipe: Recipe, known: KnownFits) -> Attempt:
    """`decompose_by` without a report; other recipes for the same layer can go on with what is ``known`` of it."""
    if not recipe.candidates:
        return attempt(weight, recipe.stages, known, sweeps=recipe.sweeps, transforms=recipe.transforms)
    found: _Tried = []
    hopeless: _Tried = []  # left unrefined
    refused: list[str] = []
    for candidate in recipe.candidates:
        try:
            if found and (plain := _unrefined(candidate)) is not None:
                rough = attempt_by(weight, plain, known)
                if not _REFINED * rough.price < (1 - recipe.margin) * _best(found, recipe)[1].price:
                    hopeless.append((candidate.name, rough))
                    continue
            each = attempt_by(weight, candidate, known)
        except (BudgetError, FormatError) as error:  # a group size that does not divide, a rank that does not fit
            refused.append(f"{candidate.name}: {error}")
            continue
        if recipe.limit is None or each.bits_per_weight <= recipe.limit.value:
            found.append((candidate.name, each))
    if not found:
        raise BudgetError(
            f"none of {len(recipe.candidates)} candidates of recipe {recipe.name!r} fits weight {tuple(weight.shape)} "
            f"within {recipe.limit}; ask for more bits. {' '.join(refused[:1])}"
        )
    name, best = _best(found, recipe)
    said: tuple[str, ...] = (f"best of {len(found) + len(hopeless)}: {name}", _tally(found))
    said += (f"too far to be refined: {_tally(hopeless)}",) if hopeless else ()
    seconds = sum(each.notes["seconds"] for _, each in (*found, *hopeless))
    return replace(best, notes={**best.notes, "seconds": seconds, "choices": (*best.notes["choices"], *said)})


def _best(found: _Tried, recipe: Recipe) -> tuple[str, Attempt]:
    """The last that undercuts the best before it by the margin."""
    name, best = found[0]
    for other, each in found[1:]:
        if each.price < (1 - recipe.margin) * best.price:
            name, best = other, each
    return name, best


def _unrefined(recipe: Recipe) -> Recipe | None:
    """The recipe without refinement of its codes; ``None`` if it has none."""
    stages = tuple(replace(s, refine=0) if isinstance(s, QuantizeStage) else s for s in recipe.stages)
    return None if stages == recipe.stages else replace(recipe, stages=stages)


def _tally(found: _Tried) -> str:
    return ", ".join(f"{name} {each.price:.4g} at {each.bits_per_weight:.3f} b" for name, each in found)
