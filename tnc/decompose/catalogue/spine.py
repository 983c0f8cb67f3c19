"""Low rank, integer bases, and a base plus low rank: the recipes of one or two stages."""

from __future__ import annotations

from functools import partial
from typing import Any

from tnc.decompose.recipes import Recipe, RecipeEntry, base_format, factor_format_of, register_recipe
from tnc.decompose.sizes import BitsPerWeight, Size
from tnc.decompose.stages import LowRankStage, MetricOf, QuantizeStage
from tnc.errors import RecipeError
from tnc.formats import NumberFormat
from tnc.metric import Metric


def _low_rank(metric: MetricOf, *, rank: Size) -> Recipe:
    return Recipe("", (LowRankStage(rank, metric=metric),))


def _pooled(*, rank: Size) -> Recipe:
    if not isinstance(rank, BitsPerWeight):
        raise RecipeError(f"svd_pooled(rank={rank!r}) needs BitsPerWeight(b): the budget of the whole model.")
    return Recipe("", (LowRankStage(rank, metric=Metric.auto),), pooled=rank)


def _quantized(method: str, **base: Any) -> Recipe:  # noqa: ANN401
    return Recipe("", (QuantizeStage(base_format(**base), method=method),))


def _compensated(
    method: str, metric: MetricOf, *, rank: Size, factor_bits: int | None = None,
    factor_format: NumberFormat | str | None = None, **base: Any,  # noqa: ANN401
) -> Recipe:  # fmt: skip
    factors = factor_format_of(factor_bits=factor_bits, factor_format=factor_format, group_size=base.get("group_size"))
    return Recipe("", (*_quantized(method, **base).stages, LowRankStage(rank, metric=metric, factor_format=factors)))


_SIZE = ("rank",)
_BASE = ("bits", "group_size", "symmetric", "format")
_BASE_AND_RANK = (*_BASE, "rank", "factor_bits", "factor_format")

for _name, _summary, _source, _options, _build in (
    ("svd", "truncated SVD of the weight, Frobenius norm", "Eckart and Young 1936",
     _SIZE, partial(_low_rank, Metric.identity)),
    ("asvd", "truncated SVD with inputs scaled by mean|x| (alpha = 1; the paper scans alpha)", "arXiv:2312.05821",
     _SIZE, partial(_low_rank, Metric.mean_abs)),
    ("svd_llm", "truncated SVD in the full H (no Cholesky, no later fine-tuning)", "arXiv:2403.07378",
     _SIZE, partial(_low_rank, Metric.full)),
    ("svd_fisher", "truncated SVD in G ⊗ H: predicted nats", "MATH.md section 1; K-FAC, arXiv:1503.05671",
     _SIZE, partial(_low_rank, Metric.fisher)),
    ("svd_pooled", "svd_fisher with ranks pooled over the whole model by nats per bit", "MATH.md section 0",
     _SIZE, _pooled),
    ("rtn", "round to nearest with clip search", "clip search as in arXiv:2306.00978",
     _BASE, partial(_quantized, "rtn")),
    ("gptq", "GPTQ with clip search and static activation order", "arXiv:2210.17323",
     _BASE, partial(_quantized, "gptq")),
    ("lorc", "RTN + SVD of the residual, Frobenius norm", "arXiv:2303.08302",
     _BASE_AND_RANK, partial(_compensated, "rtn", Metric.identity)),
    ("lqer", "RTN + SVD of the residual scaled by mean|x| (L²QER; integer instead of MXINT base)", "arXiv:2402.02446",
     _BASE_AND_RANK, partial(_compensated, "rtn", Metric.mean_abs)),
    ("qera", "RTN + SVD of the residual in the full H (QERA-exact)", "arXiv:2410.06040",
     _BASE_AND_RANK, partial(_compensated, "rtn", Metric.full)),
    ("eora", "GPTQ + SVD of the residual in the full H (plain mean instead of recency weights)", "arXiv:2410.21271",
     _BASE_AND_RANK, partial(_compensated, "gptq", Metric.full)),
    ("qlr_fisher", "GPTQ + SVD of the residual in G ⊗ H: predicted nats", "MATH.md sections 0 and 1",
     _BASE_AND_RANK, partial(_compensated, "gptq", Metric.fisher)),
    ("compensate", "SVD of what a given base leaves over, in G ⊗ H (H without gradients); alone, of the weight itself",
     "EoRA, arXiv:2410.21271; MATH.md sections 0 and 1", _SIZE, partial(_low_rank, Metric.auto)),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _options, _build))
