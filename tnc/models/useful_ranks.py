"""A recipe's ranks on the layers of a model, whose smaller ones may have no use for them (mn/(m+n))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tnc.decompose import LowRankStage, Rank, Recipe
from tnc.decompose.sizes import beyond_use, check_useful, useful_rank


def check_ranks(recipe: Recipe, shapes: Sequence[tuple[int, int]]) -> None:
    """Refuse a rank that is above the useful limit of every layer; where some are large enough, smaller ones fall back.

    Raises:
        RankError: names the limit of the largest layer.
    """
    largest = max(shapes, key=useful_rank)
    for stage in _low_rank(recipe):
        check_useful(stage.rank, largest, f"recipe {recipe.name!r}")


def served_by(recipe: Recipe, shape: tuple[int, int]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe for a layer that may be too small for its rank, and a note where it is."""
    candidates = [served_by(each, shape) for each in recipe.candidates]
    stages, notes = list(recipe.stages), [note for _, told in candidates for note in told]
    for i, stage in enumerate(stages):
        rank = beyond_use(stage.rank, shape) if isinstance(stage, LowRankStage) else None
        if isinstance(stage, LowRankStage) and rank is not None:
            stages[i] = replace(stage, rank=Rank(rank, forced=True))
            notes.append(f"rank {rank} is above the useful limit mn/(m+n) = {useful_rank(shape)} of this layer")
    served = tuple(each for each, _ in candidates)
    return (replace(recipe, stages=tuple(stages), candidates=served) if notes else recipe), tuple(dict.fromkeys(notes))


def forces_rank(recipe: Recipe) -> bool:
    """Whether somebody asked for a rank beyond use."""
    return any(isinstance(stage.rank, Rank) and stage.rank.forced for stage in _low_rank(recipe))


def _low_rank(recipe: Recipe) -> list[LowRankStage]:
    """Its low-rank stages and those of its candidates, which may have candidates of their own."""
    mine = [stage for stage in recipe.stages if isinstance(stage, LowRankStage)]
    return mine + [stage for each in recipe.candidates for stage in _low_rank(each)]
