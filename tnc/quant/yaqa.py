"""Two-sided rounding with feedback in ``G ⊗ H``, two-sided LDLQ (MATH.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import NumberFormat
from tnc.quant.clip import CLIP_RATIOS, fit_grid
from tnc.quant.feedback import feedback
from tnc.quant.gptq import gptq_with_notes
from tnc.quant.grid import check_quantizable, working_dtype
from tnc.quant.registry import QuantizerEntry, QuantizerResult, needed, register_quantizer
from tnc.quant.rings import Rings, round_rings
from tnc.quant.trellis import encoder_notes
from tnc.quant.wavefront import round_two_sided
from tnc.stats import LayerStats


def yaqa(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    damping: float = 0.01,
    gradient_damping: float = 0.1,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    tile: int = 32,
) -> QuantizerResult:
    """Codes that make ``tr(Eᵀ G E H)``, twice the predicted nats, small: feedback from both sides.

    With damped ``G = U D_G Uᵀ`` and ``H = V D_H Vᵀ``, U and V unit upper triangular in rounding order,
    ``tr(Eᵀ G E H) = ‖D_G^{1/2} (Uᵀ E V) D_H^{1/2}‖²``. Entry (i, j) takes the code nearest to
    ``q_ij + (Uᵀ E V)_ij``, that is ``w_ij`` plus the feedback of the entries above and to the left, so that entry of
    ``Uᵀ E V`` is its own rounding error alone: two-sided LDLQ. Rows go by falling ``diag(G)``, columns by
    falling ``diag(H)``; both in natural order for a trellis of anti-diagonals (`round_rings`). With ``G = I`` the
    codes are those of `gptq`. Grids are those of `rtn`. Without gradients the result is `gptq`'s, with a note.

    Args:
        weight: (out_features, in_features), any float dtype; computed in float32, in float64 for float64.
        stats: statistics of the layer with the gradient moment ``G``.
        format: number format.
        damping: of H, at least 0, in units of ``mean(diag H)``.
        gradient_damping: of G, in units of ``mean(diag G)``. From 0.001 to 0.1 it changes the predicted nats of
            int2, int3 and int4 codes by less than 0.3 % (21 layers of a 27 M Llama), and 0.1 keeps the H-error lower.
        clip_ratios: candidate ranges of a group as ratios of its full range; ``(1.0,)`` is no search.
        tile: side of the tiles that are rounded together; changes speed and float rounding only.

    Raises:
        ShapeError, NonFiniteError: for an empty or non-finite weight, or non-finite statistics.
        FormatError: if the group size does not divide in_features, or a ratio or the tile is out of range.
        StatsError: without statistics, if they are of another layer or not positive semidefinite, or if a
            damping is negative.

    Cost: ``(m³ + n³)/3`` flops in float64, ``m n (m + n)`` in products, see `round_two_sided`.
    Source: YAQA (arXiv:2505.22988, section 3), LDLQ of QuIP (arXiv:2307.13304); here by anti-diagonals.
    """
    stats = needed(stats, "yaqa")
    check_quantizable(weight, format, stats)
    if tile < 1:
        raise FormatError(f"yaqa(tile={tile}) must be at least 1; the default is 32.")
    if stats.gradient is None:
        one_sided = gptq_with_notes(weight, stats, format, damping=damping, clip_ratios=clip_ratios)
        note = "no gradient moment G: rounded with feedback in H alone (gptq)"
        return QuantizerResult(one_sided.term, one_sided.damping, (*one_sided.fallbacks, note))
    hessian = stats.hessian.to(weight.device, torch.float64)
    down, across = (None, None) if format.columns_alone else map(torch.arange, weight.shape)
    inputs = feedback(hessian, damping, order=across)
    outputs = feedback(stats.gradient.second.to(weight.device), gradient_damping, order=down, side="G")
    grid = fit_grid(weight, format, importance=hessian.diagonal(), clip_ratios=clip_ratios)
    notes, damping = inputs.notes + outputs.notes + encoder_notes(format), max(inputs.damping, outputs.damping)
    if not format.columns_alone:
        rings = Rings.of(grid, outputs.pivots, inputs.pivots)
        codes = round_rings(weight, rings, outputs.factor, inputs.factor, tile)
        return QuantizerResult(grid.term(codes), damping, notes)
    dtype, across, down = working_dtype(weight), inputs.order, outputs.order.unsqueeze(1)
    levels = grid.levels(dtype, across, len(weight)).at(itemgetter(outputs.order))
    ordered = weight.to(dtype)[down, across]
    codes = torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format)
    codes[down, across] = round_two_sided(ordered, levels, outputs.factor.to(dtype), inputs.factor.to(dtype), tile)
    return QuantizerResult(grid.term(codes), damping, notes)


register_quantizer("yaqa", QuantizerEntry("two-sided feedback in G ⊗ H (two-sided LDLQ)", "arXiv:2505.22988", yaqa))
