"""Round to nearest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tnc.formats import NumberFormat
from tnc.quant.clip import CLIP_RATIOS, fit_grid
from tnc.quant.grid import check_quantizable
from tnc.quant.registry import QuantizerEntry, QuantizerResult, register_quantizer
from tnc.quant.trellis import encoder_notes
from tnc.stats import LayerStats
from tnc.terms import Quantized


def rtn(
    weight: Tensor,
    format: NumberFormat,
    *,
    stats: LayerStats | None = None,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
) -> Quantized:
    """Every weight rounded to the nearest code of its group's grid.

    Without clipping (``clip_ratios=(1.0,)``) every entry is within half a scale, up to the rounding of the
    scale to 16 bits. With statistics the clip search weighs columns by ``diag(H)``; nothing else uses them.

    Args:
        weight: (out_features, in_features), any float dtype; computed in float32, in float64 for float64.
        format: number format.
        stats: statistics of the layer, or ``None`` for the unweighted clip search.
        clip_ratios: candidate ranges of a group as ratios of its full range; ``(1.0,)`` is no search.

    Raises:
        ShapeError, NonFiniteError: for an empty or non-finite weight.
        FormatError: if the group size does not divide in_features, or a ratio is outside (0, 1].
        StatsError: if the statistics are of another layer.

    Cost: about ten passes over the weight a ratio.
    """
    check_quantizable(weight, format, stats)
    importance = None if stats is None else stats.inputs.diagonal
    grid = fit_grid(weight, format, importance=importance, clip_ratios=clip_ratios)
    return grid.term(grid.quantize(weight))


def _run(
    weight: Tensor, stats: LayerStats | None, format: NumberFormat, *, clip_ratios: Sequence[float] = CLIP_RATIOS
) -> QuantizerResult:
    return QuantizerResult(rtn(weight, format, stats=stats, clip_ratios=clip_ratios), fallbacks=encoder_notes(format))


register_quantizer(
    "rtn", QuantizerEntry("nearest code, clip search weighted by diag(H)", "clip search as in arXiv:2306.00978", _run)
)
