"""What a recipe means for one layer: its factors' dtype, and under a pooled budget the rank that pooling gave it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tnc.column_space import spectrum
from tnc.decompose import ChosenModesStage, DenseStage, LowRankStage, MpoStage, Rank, Recipe
from tnc.decompose.forms import FormStage
from tnc.errors import ModelError, StatsError
from tnc.metric import Metric
from tnc.planning import Chosen, PooledBonds, PooledLayer
from tnc.stats import LayerStats


def stored_in(recipe: Recipe, dtype: torch.dtype | None) -> Recipe:
    """The recipe with factors stored in ``dtype`` where its stages name none."""
    stages = tuple(
        replace(stage, dtype=dtype)
        if isinstance(stage, LowRankStage | FormStage | MpoStage | ChosenModesStage) and stage.dtype is None
        else stage
        for stage in recipe.stages
    )
    return replace(recipe, stages=stages, candidates=tuple(stored_in(each, dtype) for each in recipe.candidates))


def pooled_layer(
    recipe: Recipe, weight: Tensor, stats: LayerStats, dtype: torch.dtype | None
) -> PooledLayer | PooledBonds:
    """What `tnc.planning.pooled_ranks` needs to know of a layer: what the recipe's last stage makes of its bits.

    Raises:
        StatsError: without gradients, which a comparison of layers needs.
    """
    if stats.gradient is None:
        raise StatsError(f"recipe {recipe.name!r} compares layers in nats; calibrate with fisher=True.")
    stored = dtype or weight.dtype
    bits = stored.itemsize * 8
    shape = (weight.shape[0], weight.shape[1])
    last = recipe.stages[-1]
    if isinstance(last, MpoStage):
        return PooledBonds(last.curve(weight, stats, stored), shape, dense_bits=bits)
    return PooledLayer(spectrum(weight, Metric.fisher(stats)), shape, factor_bits=bits, dense_bits=bits)


def at_rank(recipe: Recipe, rank: Chosen, dtype: torch.dtype | None) -> Recipe:
    """A pooled recipe for one layer: at its rank or bonds, or dense for ``None``.

    Raises:
        ModelError: if its last stage has no rank.
    """
    if rank is None:
        return replace(recipe, stages=(DenseStage(dtype),), transforms=(), pooled=None)
    *first, last = stored_in(recipe, dtype).stages
    if not isinstance(last, LowRankStage | MpoStage):
        raise ModelError(f"recipe {recipe.name!r} is pooled but ends with neither low rank nor an MPO.")
    if isinstance(rank, int):
        return replace(recipe, stages=(*first, replace(last, rank=Rank(rank))), pooled=None)
    assert isinstance(last, MpoStage), "bonds are pooled for operators"
    return replace(recipe, stages=(*first, replace(last, rank=rank)), pooled=None)
