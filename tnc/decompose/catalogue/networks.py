"""Matrix product operators, alone, pooled over a model, and with a low-rank correction."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

from tnc.decompose.chosen_modes import ChosenModesStage
from tnc.decompose.mpo_stage import MpoStage
from tnc.decompose.recipes import Recipe, RecipeEntry, factor_format_of, register_recipe
from tnc.decompose.site_ordering import SiteOrdering
from tnc.decompose.sizes import BitsPerWeight, Size
from tnc.decompose.stages import LowRankStage, MetricOf
from tnc.errors import RecipeError
from tnc.formats import NumberFormat
from tnc.metric import Metric

_CORE_BITS = 8  # halves the bits of 16-bit cores at nearly their error (docs/tensor-networks.md)
_CORE_GROUP = 64


def _mpo(metric: MetricOf, sweeps: int, *, rank: Size, cores: int = 2) -> Recipe:
    return Recipe("", (MpoStage(rank, cores=cores, metric=metric, sweeps=sweeps),))


def _compactifai(*, rank: Size, cores: int = 2, **core: Any) -> Recipe:  # noqa: ANN401
    """The cores are rounded as the paper does it, to the nearest code, or not at all."""
    format = _core_format(**core)
    stage = MpoStage(rank, cores=cores, metric=Metric.identity, sweeps=0, core_format=format, core_method="rtn")
    return Recipe("", (stage,))


def _quantized(*, rank: Size, cores: int = 2, factor_bits: int | None = None, **core: Any) -> Recipe:  # noqa: ANN401
    bits = _CORE_BITS if factor_bits is None and "factor_format" not in core else factor_bits
    return Recipe("", (MpoStage(rank, cores=cores, core_format=_core_format(factor_bits=bits, **core)),))


def _core_format(
    *, factor_bits: int | None = None, factor_format: NumberFormat | str | None = None, group_size: int | None = None
) -> NumberFormat | None:
    """The format that the options of the factors mean for cores, whose rows fill up their last group."""
    format = factor_format_of(
        factor_bits=factor_bits, factor_format=factor_format, group_size=group_size or _CORE_GROUP
    )
    if format is None:
        return None
    return replace(format, pad=True) if "pad" in {f.name for f in fields(format)} else format  # type: ignore[arg-type,type-var]


def _pooled(*, rank: Size, cores: int = 2, **core: Any) -> Recipe:  # noqa: ANN401
    if not isinstance(rank, BitsPerWeight):
        raise RecipeError(f"mpo_pooled(rank={rank!r}) needs BitsPerWeight(b): the budget of the whole model.")
    return Recipe("", (MpoStage(rank, cores=cores, core_format=_core_format(**core)),), pooled=rank)


def _compensated(*, rank: Size, cores: int = 2) -> Recipe:
    half = BitsPerWeight(rank.value / 2) if isinstance(rank, BitsPerWeight) else rank
    return Recipe("", (MpoStage(half, cores=cores), LowRankStage(rank, metric=Metric.auto)))


def _ordered(*, rank: Size, cores: int = 2) -> Recipe:
    stages = (MpoStage(rank, cores=cores),)
    moved = Recipe("ordered", stages, transforms=(SiteOrdering(rank),))
    return Recipe("", stages, candidates=(Recipe("as given", stages), moved))


def _chosen(*, rank: Size, blocks: int = 4) -> Recipe:
    return Recipe("", (ChosenModesStage(rank, splits=(blocks,)),))


_SIZE = ("rank", "cores")
_ROUNDED = (*_SIZE, "factor_bits", "factor_format", "group_size")

for _name, _summary, _source, _options, _build in (
    ("compactifai", "matrix product operator by TT-SVD, Frobenius norm, cores in factor_bits if given (no healing)",
     "arXiv:2401.14109", _ROUNDED, _compactifai),
    ("mpo_quantized", "mpo with cores in 8 bits or factor_bits, rounded one at a time, the others refitted (Q-MPO)",
     "MATH.md sections 3 and 4", _ROUNDED, _quantized),
    ("mpo", "matrix product operator in G ⊗ H: Kronecker whitening, then alternating least squares",
     "MATH.md section 4", _SIZE, partial(_mpo, Metric.auto, 2)),
    ("mpo_pooled", "mpo with bonds pooled over the whole model by nats per bit, cores in factor_bits if given",
     "MATH.md sections 0 and 4", _ROUNDED, _pooled),
    ("mpo_modes", "mpo of two cores over modes chosen for the layer, from those of a truncated SVD to balanced ones",
     "MATH.md section 4", ("rank", "blocks"), _chosen),
    ("mpo_ordered", "mpo in the given order of rows and columns or in a searched one, stored as indices: the better",
     "MATH.md section 4", _SIZE, _ordered),
    ("mpo_low_rank", "mpo plus a low-rank correction in the same metric (of BitsPerWeight each takes half)",
     "MATH.md sections 1 and 4", _SIZE, _compensated),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _options, _build))
