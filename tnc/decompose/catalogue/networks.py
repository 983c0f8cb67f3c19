"""Matrix product operators, alone, pooled over a model, and with a low-rank correction."""

from __future__ import annotations

from functools import partial

from tnc.decompose.mpo_stage import MpoStage
from tnc.decompose.recipes import Recipe, RecipeEntry, register_recipe
from tnc.decompose.site_ordering import SiteOrdering
from tnc.decompose.sizes import BitsPerWeight, Size
from tnc.decompose.stages import LowRankStage, MetricOf
from tnc.errors import RecipeError
from tnc.metric import Metric


def _mpo(metric: MetricOf, sweeps: int, *, rank: Size, cores: int = 2) -> Recipe:
    return Recipe("", (MpoStage(rank, cores=cores, metric=metric, sweeps=sweeps),))


def _pooled(*, rank: Size) -> Recipe:
    if not isinstance(rank, BitsPerWeight):
        raise RecipeError(f"mpo_pooled(rank={rank!r}) needs BitsPerWeight(b): the budget of the whole model.")
    return Recipe("", (MpoStage(rank, metric=Metric.auto),), pooled=rank)


def _compensated(*, rank: Size, cores: int = 2) -> Recipe:
    half = BitsPerWeight(rank.value / 2) if isinstance(rank, BitsPerWeight) else rank
    return Recipe("", (MpoStage(half, cores=cores), LowRankStage(rank, metric=Metric.auto)))


def _ordered(*, rank: Size, cores: int = 2) -> Recipe:
    stages = (MpoStage(rank, cores=cores),)
    moved = Recipe("ordered", stages, transforms=(SiteOrdering(rank),))
    return Recipe("", stages, candidates=(Recipe("as given", stages), moved))


_SIZE = ("rank", "cores")

for _name, _summary, _source, _options, _build in (
    ("compactifai", "matrix product operator by TT-SVD, Frobenius norm (no healing, cores unquantized)",
     "arXiv:2401.14109", _SIZE, partial(_mpo, Metric.identity, 0)),
    ("mpo", "matrix product operator in G ⊗ H: Kronecker whitening, then alternating least squares",
     "MATH.md section 4", _SIZE, partial(_mpo, Metric.auto, 2)),
    ("mpo_pooled", "mpo with two cores and bond dimensions pooled over the whole model by nats per bit",
     "MATH.md sections 0 and 4", ("rank",), _pooled),
    ("mpo_ordered", "mpo in the given order of rows and columns or in a searched one, stored as indices: the better",
     "MATH.md section 4", _SIZE, _ordered),
    ("mpo_low_rank", "mpo plus a low-rank correction in the same metric (of BitsPerWeight each takes half)",
     "MATH.md sections 1 and 4", _SIZE, _compensated),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _options, _build))
