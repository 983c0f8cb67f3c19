"""Published methods as recipes: each a few stages over the same functions, with its source.

`recipe("eora", bits=3, group_size=64, rank=16)` builds one; `RECIPES` lists them. Where a recipe departs
from its paper, the summary says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tnc.decompose.sizes import BitsPerWeight, Size
from tnc.decompose.stages import LowRankStage, MetricOf, QuantizeStage, Stage
from tnc.errors import RecipeError
from tnc.formats import IntFormat
from tnc.metric import Metric


@dataclass(frozen=True)
class Recipe:
    """Stages for every layer of a model.

    Attributes:
        name: as in `RECIPES`, or your own.
        stages: fitted in this order.
        sweeps: rounds over the stages.
        options: the arguments it was built from, for reports.
        pooled: budget in bits per weight over the whole model, spent by `tnc.plan.pooled_ranks`; the last
            stage's rank is then replaced for each layer. ``None`` uses the stages as they are everywhere.
    """

    name: str
    stages: tuple[Stage, ...]
    sweeps: int = 1
    options: Mapping[str, Any] | None = None
    pooled: BitsPerWeight | None = None

    def describe(self) -> str:
        """Name and arguments on one line."""
        given = ", ".join(f"{k}={v}" for k, v in (self.options or {}).items() if v is not None)
        return f"{self.name}({given})"


@dataclass(frozen=True)
class RecipeEntry:
    """A row of `RECIPES`: what it is, where it comes from, which options it needs, how it is built."""

    summary: str
    source: str
    options: tuple[str, ...]
    build: Callable[..., Recipe]


RECIPES: dict[str, RecipeEntry] = {}


def register_recipe(name: str, entry: RecipeEntry) -> None:
    """Add a recipe under a lower-case name; a name can be taken once."""
    key = _key(name)
    if key in RECIPES:
        raise RecipeError(f"recipe {key!r} is already registered ({RECIPES[key].source}); choose another name.")
    RECIPES[key] = entry


def recipe(
    name: str, *, bits: int | None = None, group_size: int | None = None, symmetric: bool | None = None,
    rank: Size | None = None,
) -> Recipe:  # fmt: skip
    """Build a recipe of `RECIPES`.

    Args:
        name: for example ``"eora"``; case and dashes do not matter.
        bits: width of the quantized base.
        group_size: input columns that share a scale; ``None`` is one group a row.
        symmetric: zero points fixed at mid-range; default asymmetric.
        rank: of the low-rank term: an int, `Rank`, `RelativeError` or `BitsPerWeight`.

    Raises:
        RecipeError: for an unknown name (lists the valid ones), an option the recipe does not take, or a missing one.
    """
    entry = RECIPES.get(_key(name))
    if entry is None:
        raise RecipeError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}.")
    given = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "rank": rank}
    given = {k: v for k, v in given.items() if v is not None}
    foreign = [k for k in given if k not in entry.options]
    missing = [k for k in ("bits", "rank") if k in entry.options and k not in given]
    if foreign or missing:
        raise RecipeError(
            f"recipe {_key(name)!r} takes {', '.join(entry.options)}; "
            + (f"it does not take {', '.join(foreign)}. " if foreign else "")
            + (f"Missing: {', '.join(missing)}." if missing else "Leave those out.")
        )
    return replace(entry.build(**given), name=_key(name), options=given)


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _low_rank(metric: MetricOf, *, rank: Size) -> Recipe:
    return Recipe("", (LowRankStage(rank, metric=metric),))


def _pooled(*, rank: Size) -> Recipe:
    if not isinstance(rank, BitsPerWeight):
        raise RecipeError(f"svd_pooled(rank={rank!r}) needs BitsPerWeight(b): the budget of the whole model.")
    return Recipe("", (LowRankStage(rank, metric=Metric.auto),), pooled=rank)


def _quantized(method: str, *, bits: int, group_size: int | None = None, symmetric: bool = False) -> Recipe:
    return Recipe("", (QuantizeStage(IntFormat(bits, group_size, symmetric), method=method),))


def _compensated(method: str, metric: MetricOf, *, rank: Size, **base: Any) -> Recipe:  # noqa: ANN401
    return Recipe("", (*_quantized(method, **base).stages, LowRankStage(rank, metric=metric)))


_SIZE = ("rank",)
_BASE = ("bits", "group_size", "symmetric")

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
     (*_BASE, "rank"), partial(_compensated, "rtn", Metric.identity)),
    ("lqer", "RTN + SVD of the residual scaled by mean|x| (L²QER; integer instead of MXINT base)", "arXiv:2402.02446",
     (*_BASE, "rank"), partial(_compensated, "rtn", Metric.mean_abs)),
    ("qera", "RTN + SVD of the residual in the full H (QERA-exact)", "arXiv:2410.06040",
     (*_BASE, "rank"), partial(_compensated, "rtn", Metric.full)),
    ("eora", "GPTQ + SVD of the residual in the full H (plain mean instead of recency weights)", "arXiv:2410.21271",
     (*_BASE, "rank"), partial(_compensated, "gptq", Metric.full)),
    ("qlr_fisher", "GPTQ + SVD of the residual in G ⊗ H: predicted nats", "MATH.md sections 0 and 1",
     (*_BASE, "rank"), partial(_compensated, "gptq", Metric.fisher)),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _options, _build))
