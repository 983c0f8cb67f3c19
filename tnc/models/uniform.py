"""One recipe for every layer of a model; a pooled one with a rank for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tnc.decompose import Recipe
from tnc.models.pooling import at_rank, pooled_layer, stored_in
from tnc.models.useful_ranks import check_ranks
from tnc.planning import pooled_ranks
from tnc.stats import LayerStats


class Uniform:
    """What `tnc.compress` asks of a `Chooser`, by a recipe.

    Args:
        recipe: for every layer.
        names: of the layers.
    """

    def __init__(self, recipe: Recipe, names: tuple[str, ...]) -> None:
        self._recipe, self.names = recipe, names

    def describe(self) -> str:
        """The recipe on one line."""
        return self._recipe.describe()

    def check_layers(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `RankError` where no layer has a use for a rank of the recipe."""
        check_ranks(self._recipe, [(shape[0], shape[1]) for shape in shapes.values()])

    def recipes_of(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats | None], dtype: torch.dtype | None
    ) -> dict[str, Recipe]:
        """The recipe for each layer; a pooled one at the ranks that its budget gives to these layers, all at once."""
        if self._recipe.pooled is None:
            return dict.fromkeys(weights, stored_in(self._recipe, dtype))
        known = {name: each for name, each in stats.items() if each is not None}
        layers = {name: pooled_layer(self._recipe, weight, known[name], dtype) for name, weight in weights.items()}
        ranks = pooled_ranks(layers, self._recipe.pooled.value).ranks
        return {name: at_rank(self._recipe, ranks[name], dtype) for name in weights}

    def check_layer(self, name: str, report: Mapping[str, Any]) -> None:
        """Nothing was promised."""
