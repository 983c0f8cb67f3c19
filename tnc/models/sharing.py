"""Which layers of a model see the same inputs, so that they can share a right factor."""

from __future__ import annotations

from collections.abc import Mapping

from tnc.decompose import LowRankStage, Recipe
from tnc.errors import RecipeError
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
