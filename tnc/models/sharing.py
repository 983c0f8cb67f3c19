"""Which layers of a model see the same inputs: they can share a right factor, and run as siblings."""

from __future__ import annotations

from collections.abc import Mapping

from tnc.decompose import LowRankStage, Recipe
from tnc.errors import RecipeError
from tnc.planning import input_groups as by_input
from tnc.stats import LayerStats


def sharing_groups(recipes: Mapping[str, Recipe], stats: Mapping[str, LayerStats | None]) -> list[list[str]]:
    """Layer names in groups that are decomposed together, in order of their first member.

    Layers belong together where their recipe shares inputs and is the same, and their statistics hold one and the
    same input moments, as `calibrate` gives them to layers that were called with one tensor.

    Raises:
        RecipeError: for a recipe that shares inputs between transforms.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, each in stats.items():
        recipe = recipes[name]
        together = recipe.shared_inputs and each is not None and any(isinstance(s, LowRankStage) for s in recipe.stages)
        if together and recipe.transforms:
            raise RecipeError(
                f"recipe {recipe.name!r} shares right factors and has transforms, which differ by layer; leave one out."
            )
        key = (id(each.inputs), repr(recipe.stages), recipe.sweeps) if together and each is not None else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def input_groups(stats: Mapping[str, LayerStats | None]) -> list[list[str]]:
    """Names of layers that calibration saw with one input, two and more together.

    Layers with notes are left out: an expert that no token reached has the moments of others.
    """
    reached = {name: each for name, each in stats.items() if each is not None and not each.notes}
    return [names for names in by_input(reached) if len(names) > 1]
