"""Recipes in another basis: rotated by Hadamard matrices, or with the inputs scaled."""

from __future__ import annotations

from functools import partial
from typing import Any

from tnc.decompose.catalogue.quantized import REFINE_SWEEPS
from tnc.decompose.learnt_scaling import LearntScaling
from tnc.decompose.recipes import Recipe, RecipeEntry, factor_format_of, register_recipe
from tnc.decompose.scaling import AwqScaling, Smoothing
from tnc.decompose.sizes import Size
from tnc.decompose.stages import LowRankStage, MetricOf, QuantizeStage
from tnc.decompose.transforms import InputRotation, OutputRotation, Transform
from tnc.formats import IntFormat, NumberFormat, TrellisFormat
from tnc.metric import Metric

_ONE_SIDED: tuple[Transform, ...] = (InputRotation(),)
_TWO_SIDED: tuple[Transform, ...] = (InputRotation(), OutputRotation())


def _format(bits: int, group_size: int | None = None, symmetric: bool = False) -> IntFormat:
    return IntFormat(bits, group_size, symmetric)


def _trellis(bits: int, group_size: int | None = None, state_bits: int = 12, *, path: str) -> TrellisFormat:
    return TrellisFormat(bits, state_bits, path=path, group_size=group_size)


def _rotated(method: str, transforms: tuple[Transform, ...], refine: int = 0, **base: Any) -> Recipe:  # noqa: ANN401
    return Recipe("", (QuantizeStage(_format(**base), method=method, refine=refine),), transforms=transforms)


def _coded(method: str, path: str, **base: Any) -> Recipe:  # noqa: ANN401
    return Recipe("", (QuantizeStage(_trellis(**base, path=path), method=method),), transforms=_TWO_SIDED)


def _coded_low_rank(
    *, rank: Size, factor_bits: int | None = None, factor_format: NumberFormat | str | None = None,
    **base: Any,  # noqa: ANN401
) -> Recipe:  # fmt: skip
    factors = factor_format_of(factor_bits=factor_bits, factor_format=factor_format)
    stages = _coded("yaqa", "diagonal", **base).stages
    return Recipe("", (*stages, LowRankStage(rank, factor_format=factors)), transforms=_TWO_SIDED)


def _rotated_low_rank(method: str, metric: MetricOf, *, rank: Size, **base: Any) -> Recipe:  # noqa: ANN401
    stages = (QuantizeStage(_format(**base), method=method), LowRankStage(rank, metric=metric))
    return Recipe("", stages, transforms=_TWO_SIDED)


def _awq(method: str, **base: Any) -> Recipe:  # noqa: ANN401
    return Recipe("", (QuantizeStage(_format(**base), method=method),), transforms=(AwqScaling(_format(**base)),))


def _omniquant(**base: Any) -> Recipe:  # noqa: ANN401
    format = _format(**base)
    stage = QuantizeStage(format, method="learned_clipping")
    return Recipe("", (stage,), transforms=(LearntScaling(format),))


def _svdquant(*, rank: Size, **base: Any) -> Recipe:  # noqa: ANN401
    stages = (LowRankStage(rank, metric=Metric.identity), QuantizeStage(_format(**base), method="gptq"))
    return Recipe("", stages, transforms=(Smoothing(),))


_BASE = ("bits", "group_size", "symmetric")
_CODED = ("bits", "group_size", "state_bits")

for _name, _summary, _source, _options, _build in (
    ("gptq_rotated", "GPTQ after a randomised Hadamard rotation of the inputs", "QuIP#, arXiv:2402.04396",
     _BASE, partial(_rotated, "gptq", _ONE_SIDED)),
    ("quip", "GPTQ (as LDLQ) after a rotation of inputs and outputs; integers in the place of E8 lattices",
     "QuIP, arXiv:2307.13304; QuIP#, arXiv:2402.04396", _BASE, partial(_rotated, "gptq", _TWO_SIDED)),
    ("yaqa_rotated", "two-sided rounding in G ⊗ H after a rotation of inputs and outputs (integers, no trellis)",
     "YAQA, arXiv:2505.22988", _BASE, partial(_rotated, "yaqa", _TWO_SIDED)),
    ("yaqa_rotated_refined", "yaqa_rotated, then codes by coordinate descent and refitted scales in G ⊗ H",
     "YAQA, arXiv:2505.22988; CDQuant, arXiv:2406.17542", _BASE, partial(_rotated, "yaqa", _TWO_SIDED, REFINE_SWEEPS)),
    ("qtip", "GPTQ on a bitshift trellis after a rotation of inputs and outputs (2, 3 or 4 bits; sequences down "
     "columns in the place of 16 x 16 tiles; no fine-tuning)", "QTIP, arXiv:2406.11235", _CODED,
     partial(_coded, "gptq", "column")),
    ("yaqa_trellis", "two-sided rounding in G ⊗ H on a trellis along anti-diagonals, after a rotation of inputs and "
     "outputs (2, 3 or 4 bits)", "YAQA, arXiv:2505.22988; QTIP, arXiv:2406.11235; anti-diagonals: docs/quantizers.md",
     _CODED, partial(_coded, "yaqa", "diagonal")),
    ("yaqa_trellis_lr", "yaqa_trellis + SVD of the residual in G ⊗ H",
     "YAQA, arXiv:2505.22988; QTIP, arXiv:2406.11235; MATH.md section 1",
     (*_CODED, "rank", "factor_bits", "factor_format"), _coded_low_rank),
    ("yaqa_lr", "yaqa_rotated + SVD of the residual in G ⊗ H", "YAQA, arXiv:2505.22988; MATH.md section 1",
     (*_BASE, "rank"), partial(_rotated_low_rank, "yaqa", Metric.fisher)),
    ("quip_lr", "quip + SVD of the residual in the full H", "QuIP#, arXiv:2402.04396; EoRA, arXiv:2410.21271",
     (*_BASE, "rank"), partial(_rotated_low_rank, "gptq", Metric.full)),
    ("awq", "RTN of W diag(s), s = mean|x|^alpha, alpha of each layer by its H-error", "arXiv:2306.00978",
     _BASE, partial(_awq, "rtn")),
    ("awq_gptq", "GPTQ of W diag(s) with AWQ's s", "arXiv:2306.00978; arXiv:2210.17323",
     _BASE, partial(_awq, "gptq")),
    ("omniquant", "scaling of the inputs and ranges learnt by gradients, nearest codes (a layer's loss without "
     "activations, no shift, the scaling stored)", "arXiv:2308.13137", _BASE, _omniquant),
    ("svdquant_smooth", "smoothed inputs, SVD first, GPTQ of what it leaves (weights only, mean|x| for max|x|)",
     "arXiv:2411.05007", (*_BASE, "rank"), _svdquant),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _options, _build))
