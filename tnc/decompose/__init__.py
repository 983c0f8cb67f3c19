"""Decompositions: low-rank closed forms, stages, the engine, recipes and reports."""

from tnc.decompose import catalogue  # noqa: F401  registers the recipes
from tnc.decompose.chosen_modes import ChosenModesStage
from tnc.decompose.dense_target import DenseTarget
from tnc.decompose.engine import Decomposition, decompose
from tnc.decompose.factor_formats import FactorFormats
from tnc.decompose.factors import quantize_factors
from tnc.decompose.gate import Gate
from tnc.decompose.learnt_scaling import LearntScaling
from tnc.decompose.low_rank import compensate, truncated_svd
from tnc.decompose.mpo_stage import MpoStage
from tnc.decompose.recipes import RECIPES, Recipe, RecipeEntry, recipe, register_recipe
from tnc.decompose.report import LayerReport, measure
from tnc.decompose.scaling import AwqScaling, Smoothing
from tnc.decompose.selected import SelectedStage
from tnc.decompose.site_ordering import SiteOrdering
from tnc.decompose.sizes import BitsPerWeight, Rank, RelativeError, Size
from tnc.decompose.stages import DenseStage, Fitted, GivenStage, LowRankStage, QuantizeStage, Stage, Target
from tnc.decompose.transforms import (
    InputPermutation,
    InputRotation,
    OutputPermutation,
    OutputRotation,
    Transform,
    Transformed,
)

__all__ = [
    "RECIPES", "AwqScaling", "BitsPerWeight", "ChosenModesStage", "Decomposition", "DenseStage", "DenseTarget",
    "FactorFormats", "Fitted", "Gate", "GivenStage", "InputPermutation", "InputRotation", "LayerReport",
    "LearntScaling", "LowRankStage", "MpoStage", "OutputPermutation", "OutputRotation", "QuantizeStage", "Rank",
    "Recipe", "RecipeEntry", "RelativeError", "SelectedStage", "SiteOrdering", "Size", "Smoothing", "Stage", "Target",
    "Transform", "Transformed", "compensate", "decompose", "measure", "quantize_factors", "recipe", "register_recipe",
    "truncated_svd",
]  # fmt: skip
