"""GPTQ: rounding with feedback in the metric of the inputs (MATH.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import NumberFormat
from tnc.quant.clip import CLIP_RATIOS, fit_grid
from tnc.quant.feedback import feedback
from tnc.quant.grid import Grid, check_quantizable, working_dtype
from tnc.quant.levels import Columns
from tnc.quant.order import column_order
from tnc.quant.registry import QuantizerEntry, QuantizerResult, needed, register_quantizer
from tnc.quant.rings import Rings, round_rings
from tnc.quant.trellis import encoder_notes
from tnc.stats import LayerStats
from tnc.terms import Quantized


def gptq(
    weight: Tensor,
    stats: LayerStats,
    format: NumberFormat,
    *,
    damping: float = 0.01,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    order: str = "activation",
    block_size: int = 128,
) -> Quantized:
    """Codes that make ``||W - Q||_H`` small: columns are rounded in turn and make up for earlier errors.

    With ``H + damping mean(diag H) I = V D Vᵀ``, V unit upper triangular, column j takes the code nearest to
    ``w_j + sum_{k<j} V_kj (w_k - q_k)``. This is LDLQ (QuIP, arXiv:2307.13304) and equals GPTQ's
    updates by the upper Cholesky factor of the inverse (arXiv:2210.17323, algorithm 1) without forming an
    inverse. Columns go by falling ``diag(H)`` by default. Grids are those of `rtn` with the same statistics, fixed
    beforehand (static groups), and codes are stored in natural order, so nothing is permuted at run time.
    Dead columns (``H_jj = 0``) get their `rtn` codes. Where the factorization fails, the damping grows
    tenfold.

    Args:
        weight: (out_features, in_features), any float dtype.
        stats: statistics of the layer; only ``H`` of the calibration tokens is used.
        format: number format.
        damping: at least 0, in units of ``mean(diag H)``.
        clip_ratios: candidate ranges of a group as ratios of its full range; ``(1.0,)`` is no search.
        order: ``"activation"``, by falling ``diag(H)``; ``"group"``, whole groups by falling mean of ``diag(H)``
            and columns by ``diag(H)`` inside (the group-aware order of GPTQModel, from its published
            description); ``"natural"``, which formats that code anti-diagonals always take.
        block_size: columns between two matrix products; changes speed and float rounding only.

    Raises:
        ShapeError, NonFiniteError: for an empty or non-finite weight, or non-finite statistics.
        FormatError: if the group size does not divide in_features, a ratio or the block size is out of range, or
            the order is unknown.
        StatsError: if the statistics are of another layer, H is not positive semidefinite, or the damping is
            negative.

    Cost: ``n³/3 + m n²`` flops; the factorization in float64, updates in float32 (float64 for float64
    weights).
    """
    return gptq_with_notes(
        weight, stats, format, damping=damping, clip_ratios=clip_ratios, order=order, block_size=block_size
    ).term


def gptq_with_notes(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    damping: float = 0.01,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    order: str = "activation",
    block_size: int = 128,
) -> QuantizerResult:
    """`gptq`, with the damping used and every fallback taken, for reports."""
    stats = needed(stats, "gptq")
    check_quantizable(weight, format, stats)
    hessian = stats.hessian.to(weight.device, torch.float64)
    if block_size < 1:
        raise FormatError(f"gptq(block_size={block_size}) must be at least 1; the default is 128.")
    if not format.columns_alone:
        return _round_lines(weight, hessian, format, damping, clip_ratios)
    columns = column_order(order, hessian.diagonal(), format.layout((weight.shape[0], weight.shape[1])).columns)
    found = feedback(hessian, damping, order=columns)
    grid = fit_grid(weight, format, importance=hessian.diagonal(), clip_ratios=clip_ratios)
    codes = _round_with_feedback(weight, grid, found.factor, found.order, block_size)
    return QuantizerResult(grid.term(codes), found.damping, found.notes + encoder_notes(format))


def _round_lines(
    weight: Tensor, hessian: Tensor, format: NumberFormat, damping: float, clip_ratios: Sequence[float]
) -> QuantizerResult:
    """Formats that code anti-diagonals: columns in natural order, feedback as everywhere."""
    found = feedback(hessian, damping, order=torch.arange(len(hessian)))
    grid = fit_grid(weight, format, importance=hessian.diagonal(), clip_ratios=clip_ratios)
    rings = Rings.of(grid, found.pivots.new_ones(len(weight)), found.pivots)
    codes = round_rings(weight, rings, None, found.factor)
    return QuantizerResult(grid.term(codes), found.damping, found.notes + encoder_notes(format))


def _round_with_feedback(weight: Tensor, grid: Grid, factor: Tensor, order: Tensor, block_size: int) -> Tensor:
    """Codes (m, n) uint8 in natural column order."""
    dtype = working_dtype(weight)
    factor = factor.to(dtype)
    columns = weight.T[order].to(dtype)  # (n, m): a column of the weight is contiguous
    errors = torch.empty_like(columns)
    codes = torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for start in range(0, len(order), block_size):
        block = slice(start, start + block_size)
        levels = grid.levels(dtype, order[block], len(weight)).columns()
        targets = torch.addmm(columns[block], factor[:start, block].T, errors[:start])
        chosen = _round_block(columns[block], targets, levels, factor[block, block], errors[block])
        codes[:, order[block]] = levels.codes(chosen).T
    return codes


def _round_block(columns: Tensor, targets: Tensor, levels: Columns, factor: Tensor, errors: Tensor) -> Tensor:
    """Chosen levels (b, m) of one block of columns (b, m); writes ``columns - values`` to ``errors``."""
    chosen = torch.empty_like(columns, dtype=levels.dtype)
    for j in range(len(columns)):
        target = torch.addmv(targets[j], errors[:j].T, factor[:j, j])
        chosen[j] = levels.round(j, target, columns[j], errors[j])
    return chosen


register_quantizer(
    "gptq",
    QuantizerEntry("feedback in H, columns by falling diag(H), static groups", "arXiv:2210.17323", gptq_with_notes),
)
