"""GPTQ: rounding with feedback in the metric of the inputs (MATH.md section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tnc.errors import FormatError, StatsError, check_finite
from tnc.formats import NumberFormat
from tnc.quant.clip import CLIP_RATIOS, fit_grid
from tnc.quant.grid import Grid, check_quantizable, working_dtype
from tnc.quant.levels import Columns
from tnc.quant.registry import QuantizerEntry, QuantizerResult, needed, register_quantizer
from tnc.stats import LayerStats
from tnc.terms import Quantized

_FIRST_DAMPING = 1e-6  # tried after an undamped factorization failed
_LAST_DAMPING = 1e3  # a second moment factors long before; what fails here is far from semidefinite

# Relative to H_jj. A pivot this small is rounding: up to 2e-11 was seen where the exact one is 0 (n = 16), and H
# itself comes from float32 products. The default damping leaves pivots above 0.01 / n.
_LEAST_PIVOT = 1e-8


def gptq(
    weight: Tensor,
    stats: LayerStats,
    format: NumberFormat,
    *,
    damping: float = 0.01,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    block_size: int = 128,
) -> Quantized:
    """Codes that make ``||W - Q||_H`` small: columns are rounded in turn and make up for earlier errors.

    With ``H + damping mean(diag H) I = V D Vᵀ``, V unit upper triangular, column j takes the code nearest to
    ``w_j + sum_{k<j} V_kj (w_k - q_k)``. This is LDLQ (QuIP, arXiv:2307.13304) and equals GPTQ's
    updates by the upper Cholesky factor of the inverse (arXiv:2210.17323, algorithm 1) without forming an
    inverse. Columns go by falling ``diag(H)``. Grids are those of `rtn` with the same statistics, fixed
    beforehand (static groups), and codes are stored in natural order, so nothing is permuted at run time.
    Dead columns (``H_jj = 0``) get their `rtn` codes. Where the factorization fails, the damping grows
    tenfold.

    Args:
        weight: (out_features, in_features), any float dtype.
        stats: statistics of the layer; only ``H`` of the calibration tokens is used.
        format: number format.
        damping: at least 0, in units of ``mean(diag H)``.
        clip_ratios: candidate ranges of a group as ratios of its full range; ``(1.0,)`` is no search.
        block_size: columns between two matrix products; changes speed and float rounding only.

    Raises:
        ShapeError, NonFiniteError: for an empty or non-finite weight, or non-finite statistics.
        FormatError: if the group size does not divide in_features, or a ratio or the block size is out of
            range.
        StatsError: if the statistics are of another layer, H is not positive semidefinite, or the damping is
            negative.

    Cost: ``n³/3 + m n²`` flops; the factorization in float64, updates in float32 (float64 for float64
    weights).
    """
    result = gptq_with_notes(weight, stats, format, damping=damping, clip_ratios=clip_ratios, block_size=block_size)
    return result.term


def gptq_with_notes(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    damping: float = 0.01,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
    block_size: int = 128,
) -> QuantizerResult:
    """`gptq`, with the damping used and every fallback taken, for reports."""
    stats = needed(stats, "gptq")
    check_quantizable(weight, format, stats)
    hessian = check_finite(stats.hessian, "the second moment H").to(weight.device, torch.float64)
    if block_size < 1:
        raise FormatError(f"gptq(block_size={block_size}) must be at least 1; the default is 128.")
    grid = fit_grid(weight, format, importance=hessian.diagonal(), clip_ratios=clip_ratios)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    feedback, used, fallbacks = _feedback(hessian[order][:, order], damping)
    codes = _round_with_feedback(weight, grid, feedback, order, block_size)
    return QuantizerResult(grid.term(codes), used, fallbacks)


def _feedback(hessian: Tensor, damping: float) -> tuple[Tensor, float, tuple[str, ...]]:
    """V of the damped hessian (n, n) float64, the damping that made it definite, and notes."""
    if not (math.isfinite(damping) and damping >= 0):
        raise StatsError(f"damping={damping} must be a finite number of at least 0; the default is 0.01.")
    normal, notes = _normalized(hessian)
    used = damping
    while (factor := _unit_upper(normal, used)) is None:
        used = max(10 * used, _FIRST_DAMPING)
        if used > max(_LAST_DAMPING, 10 * damping):
            raise StatsError(
                f"H + {used / 10:g} mean(diag H) I is still not positive definite; expected a mean of x xᵀ, "
                "which is positive semidefinite. Calibrate again, or check the matrix given to from_hessian."
            )
    if used != damping:
        notes += (f"damping raised from {damping:g} to {used:g}: the damped H was not positive definite",)
    return factor, used, notes


def _normalized(hessian: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """H over ``mean(diag H)`` with dead columns decoupled at 1, and a note on them."""
    dead = hessian.diagonal() <= 0
    mean = float(hessian.diagonal().mean())
    normal = hessian / mean if mean > 0 else hessian.clone()
    count = int(dead.sum())
    if count == 0:
        return normal, ()
    normal[dead, :] = 0
    normal[:, dead] = 0
    normal.diagonal()[dead] = 1
    return normal, (f"{count} of {len(dead)} columns are dead (H_jj = 0): rounded to nearest",)


def _unit_upper(normal: Tensor, damping: float) -> Tensor | None:
    """V of ``normal + damping I = V D Vᵀ``, or ``None`` where a pivot is not positive beyond rounding."""
    damped = normal.clone()
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    upper: Tensor = lower.flip(0, 1)  # upper @ upper.T = damped
    noise = _LEAST_PIVOT * damped.diagonal()
    if int(info) or not bool((upper.diagonal() ** 2 > noise).all()):
        return None
    return upper / upper.diagonal()


def _round_with_feedback(weight: Tensor, grid: Grid, feedback: Tensor, order: Tensor, block_size: int) -> Tensor:
    """Codes (m, n) uint8 in natural column order."""
    dtype = working_dtype(weight)
    feedback = feedback.to(dtype)
    columns = weight.T[order].to(dtype)  # (n, m): a column of the weight is contiguous
    errors = torch.empty_like(columns)
    codes = torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for start in range(0, len(order), block_size):
        block = slice(start, start + block_size)
        levels = grid.levels(dtype, order[block], len(weight)).columns()
        targets = torch.addmm(columns[block], feedback[:start, block].T, errors[:start])
        chosen = _round_block(columns[block], targets, levels, feedback[block, block], errors[block])
        codes[:, order[block]] = levels.codes(chosen).T
    return codes


def _round_block(columns: Tensor, targets: Tensor, levels: Columns, feedback: Tensor, errors: Tensor) -> Tensor:
    """Chosen levels (b, m) of one block of columns (b, m); writes ``columns - values`` to ``errors``."""
    chosen = torch.empty_like(columns, dtype=levels.dtype)
    for j in range(len(columns)):
        target = torch.addmv(targets[j], errors[:j].T, feedback[:j, j])
        chosen[j] = levels.round(j, target, columns[j], errors[j])
    return chosen


register_quantizer(
    "gptq",
    QuantizerEntry("feedback in H, columns by falling diag(H), static groups", "arXiv:2210.17323", gptq_with_notes),
)
