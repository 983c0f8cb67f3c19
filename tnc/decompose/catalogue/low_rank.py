"""A base and low-rank factors that are fitted to each other: orders, starts, alternation, held-out choices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tnc.decompose.gate import Gate
from tnc.decompose.recipes import Recipe, RecipeEntry, base_format, factor_format_of, register_recipe
from tnc.decompose.selected import SelectedStage
from tnc.decompose.sizes import Rank, Size
from tnc.decompose.stages import LowRankStage, QuantizeStage
from tnc.errors import RecipeError
from tnc.formats import NumberFormat
from tnc.metric import Metric

_SWEEPS = 2  # more bring little: the first ones decide (docs/low-rank.md)


def _build(
    make: Callable[..., Recipe], *, rank: Size, factor_bits: int | None = None,
    factor_format: NumberFormat | str | None = None, sweeps: int = _SWEEPS, **base: Any,  # noqa: ANN401
) -> Recipe:  # fmt: skip
    group_size = base.get("group_size")
    factors = factor_format_of(factor_bits=factor_bits, factor_format=factor_format, group_size=group_size)
    quantize = partial(QuantizeStage, base_format(**base))
    return make(quantize, partial(LowRankStage, rank, factor_format=factors), rank, sweeps)


def _loftq(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    return Recipe("", (base(method="rtn"), low_rank(metric=Metric.identity)), sweeps)


def _caldera(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    return Recipe("", (low_rank(metric=Metric.full), base()), sweeps)


def _odlri(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    salient = LowRankStage(rank, metric=partial(Metric.salient, channels=_whole(rank, "odlri")))
    return Recipe("", (low_rank(metric=Metric.full, first=salient), base()), sweeps)


def _svdquant(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    return Recipe("", (low_rank(metric=Metric.identity), base()), sweeps)


def _srr(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    half = LowRankStage(_whole(rank, "srr") // 2)
    return Recipe("", (low_rank(first=half), base()), sweeps)


def _alternating(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    return Recipe("", (base(), low_rank()), sweeps)


def _gated(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    return Recipe("", (base(), low_rank(metric=Gate())), sweeps)


def _shared(base: Any, low_rank: Any, rank: Size, sweeps: int) -> Recipe:  # noqa: ANN401
    return Recipe("", (base(), low_rank()), sweeps, shared_inputs=True)


def _whole(rank: Size, name: str) -> int:
    value = rank.value if isinstance(rank, Rank) else rank
    if not isinstance(value, int) or value < 1:
        raise RecipeError(f"{name}(rank={rank!r}) starts from a share of the rank; expected an integer of at least 1.")
    return value


def _serq(
    *, rank: Size, factor_bits: int | None = None, factor_format: NumberFormat | str | None = None,
    **base: Any,  # noqa: ANN401
) -> Recipe:  # fmt: skip
    factor = factor_format_of(factor_bits=factor_bits, factor_format=factor_format)
    return Recipe("", (QuantizeStage(base_format(**base)), SelectedStage(rank, factor)))


_OPTIONS = ("bits", "group_size", "symmetric", "format", "rank", "factor_bits", "factor_format", "sweeps")

for _name, _summary, _source, _make in (
    ("loftq", "RTN and SVD of the residual in turn, Frobenius norm (2 sweeps and integers; the paper: 5 and NF4)",
     "arXiv:2310.08659", _loftq),
    ("caldera", "low rank of W in H first, then GPTQ and low rank in turn (2 sweeps; the paper: 15, E8 lattice)",
     "arXiv:2405.18886", _caldera),
    ("odlri", "caldera started from the inputs of largest H_jj, as many as the rank (the paper tunes how many)",
     "arXiv:2506.02077", _odlri),
    ("svdquant", "SVD first, GPTQ of what it leaves; 2 sweeps, unsmoothed (svdquant_smooth: with smoothing)",
     "arXiv:2411.05007", _svdquant),
    ("srr", "half the rank preserved before GPTQ, all of it refitted after, in G ⊗ H (the paper has a criterion)",
     "arXiv:2602.02001", _srr),
    ("qlr_alternating", "GPTQ and low rank in turn, in G ⊗ H: predicted nats", "MATH.md section 3", _alternating),
    ("qlr_shared", "qlr_alternating with one right factor for layers of the same inputs (q/k/v, gate/up)",
     "MATH.md section 3", _shared),
    ("qlr_gated", "qlr_alternating; full, shrunk or diagonal H of each low-rank term by held-out error",
     "MATH.md section 1; QERA, arXiv:2410.06040", _gated),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _OPTIONS, partial(_build, _make)))
register_recipe(
    "serq",
    RecipeEntry(
        "GPTQ + one factor on the inputs that matter most, their columns refitted in G ⊗ H (weights only; inputs "
        "chosen by the error, no flattening of activations)", "arXiv:2603.08185", _OPTIONS[:-1], _serq,
    ),
)  # fmt: skip
