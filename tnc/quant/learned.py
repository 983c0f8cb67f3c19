"""Rounding and ranges learnt by gradient descent on ``tr(Eᵀ G E H)``: AutoRound, and OmniQuant's clipping alone.

The loss needs no activations: one step is one application of the metric, a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from tnc.formats import NumberFormat
from tnc.metric import Metric
from tnc.quant.clip import CLIP_RATIOS
from tnc.quant.descent import Descent, Schedule
from tnc.quant.grid import check_quantizable
from tnc.quant.registry import QuantizerEntry, QuantizerResult, needed, quantizer, register_quantizer
from tnc.stats import LayerStats
from tnc.terms import Quantized, dense64

Progress = Callable[[int, int, float], None]
_CHECKS = 20  # times the codes as stored are measured and the best kept


def autoround(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    steps: int = 200,
    rate: float | None = None,
    start: str = "rtn",
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    progress: Progress | None = None,
) -> QuantizerResult:
    """Codes ``round(a/s + V)`` with V in [−½, ½] and the scales s learnt by signed gradient descent.

    The gradient goes straight through the rounding; steps fall linearly from ``rate`` to 0. ``a`` is the weight, or
    with ``start`` another quantizer's values: its codes then stand at V = 0, up to half a step. The best codes
    as stored, the start among them, are kept.

    Args:
        weight: (out_features, in_features), any float dtype; learnt in float32.
        stats: statistics of the layer: the loss is in ``G ⊗ H``, ``H`` without gradients.
        format: number format.
        steps: at least 0.
        rate: first step of V, in units of the scale, and of the scales, relative; ``None`` is ``1 / steps``.
        start: a name of `tnc.quant.QUANTIZERS`.
        clip_ratios: of the first grid.
        progress: called with (step, steps, squared error of the best so far).

    Raises:
        ShapeError, NonFiniteError, FormatError, StatsError: as `tnc.quant.gptq`; FormatError also for negative
            steps or a rate that is not positive.
        RecipeError: for an unknown start.

    Cost a step: one product ``G E H``, ``2 m n (m + n)`` flops. Deterministic: nothing is drawn.
    Source: SignRound (arXiv:2309.05516, equations 3 to 6), there on the outputs of a block and with activations.
    Integer zero points stay as fitted.
    """
    stats = needed(stats, "autoround")
    first = _start(weight, stats, format, start, clip_ratios)
    schedule = Schedule.of("autoround", steps, rate)
    term = _learn(weight, first.term, Metric.auto(stats), schedule, rounding=True, progress=progress)
    return replace(first, term=term)


def learned_clipping(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    steps: int = 100,
    rate: float = 0.01,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    progress: Progress | None = None,
) -> QuantizerResult:
    """Nearest codes on ranges learnt by signed gradient descent: OmniQuant's learnable weight clipping.

    Arguments and errors as `autoround`, without V. The paper learns both ends of a range through sigmoids on a
    block's outputs; here the scale is learnt, the zero point stays as fitted, and the loss is that of the layer.

    Source: OmniQuant (arXiv:2308.13137, section 3.2).
    """
    stats = needed(stats, "learned_clipping")
    first = _start(weight, stats, format, "rtn", clip_ratios)
    schedule = Schedule.of("learned_clipping", steps, rate)
    term = _learn(weight, first.term, Metric.auto(stats), schedule, rounding=False, progress=progress)
    return replace(first, term=term)


def _start(
    weight: Tensor, stats: LayerStats, format: NumberFormat, name: str, clip_ratios: Sequence[float]
) -> QuantizerResult:
    check_quantizable(weight, format, stats)
    return quantizer(name).run(weight, stats, format, clip_ratios=clip_ratios)


def _learn(
    weight: Tensor, first: Quantized, metric: Metric, schedule: Schedule, *, rounding: bool, progress: Progress | None
) -> Quantized:
    """The best term, as stored, on the way."""
    reference, narrow = weight.double(), weight.float()
    descent = Descent.of(narrow, first)
    best, least = first, metric.squared_norm(reference - dense64(first))
    every = max(1, schedule.steps // _CHECKS)
    for step in range(schedule.steps):
        descent.step(metric, schedule.at(step), rounding=rounding)
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            term = descent.stored()
            error = metric.squared_norm(reference - dense64(term))
            if error < least:
                best, least = term, error
            if progress is not None:
                progress(step + 1, schedule.steps, least)
    return best


register_quantizer(
    "autoround",
    QuantizerEntry("rounding and scales learnt by signed gradients", "arXiv:2309.05516", autoround),
)
register_quantizer(
    "learned_clipping",
    QuantizerEntry("nearest codes on ranges learnt by signed gradients (OmniQuant's LWC)", "arXiv:2308.13137",
                   learned_clipping),
)  # fmt: skip
