"""Half-quadratic quantization: scales and zero points without any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import Layout, NumberFormat
from tnc.quant.clip import CLIP_RATIOS, fit_grid
from tnc.quant.grid import Grid, check_quantizable
from tnc.quant.registry import QuantizerEntry, QuantizerResult, register_quantizer
from tnc.quant.rescale import with_scales
from tnc.stats import LayerStats

_GROWTH = 1.01  # of beta an iteration, as published


def hqq(
    weight: Tensor,
    stats: LayerStats | None,
    format: NumberFormat,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    iterations: int = 20,
    clip_ratios: Sequence[float] = CLIP_RATIOS,
) -> QuantizerResult:
    """Nearest codes on the grid that makes ``sum |w − q|^p`` small, which forgives outliers (p < 1).

    Half-quadratic splitting: ``e ← shrink(w − q)``, the proximal map of ``|·|^p`` at weight ``1/beta``, in units of
    the scale; then the grid that fits ``w − e`` with the codes held: zero points by their mean, rounded to the
    integers that formats store, and scales by least squares. Each block keeps its best grid. Statistics are not
    used.

    Args:
        weight: (m, n), any float dtype; computed in float32.
        stats: ignored.
        format: number format.
        power: p in (0, 1].
        beta: weight of the quadratic part, above 0; grows by 1 % an iteration.
        iterations: at least 0.
        clip_ratios: of the first grid.

    Raises:
        ShapeError, NonFiniteError: for an empty or non-finite weight.
        FormatError: if the group size does not divide in_features, or an option is out of range.

    Cost: about ten passes over the weight an iteration.
    Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023,
    https://mobiusml.github.io/hqq_blog/. There zero points are real numbers and scales are held.
    """
    check_quantizable(weight, format, stats)
    if not (0 < power <= 1 and beta > 0 and iterations >= 0):
        raise FormatError(
            f"hqq(power={power}, beta={beta}, iterations={iterations}) needs 0 < power <= 1, beta > 0, iterations >= 0."
        )
    narrow = weight.float()
    layout = format.layout((weight.shape[0], weight.shape[1]))
    best = grid = fit_grid(narrow, format, clip_ratios=clip_ratios)
    least = _loss(narrow, grid, layout, power)
    for _ in range(iterations):
        grid = _refit(narrow, grid, layout, power, beta)
        loss = _loss(narrow, grid, layout, power)
        best, least = _better(loss < least, grid, best), torch.minimum(loss, least)
        beta *= _GROWTH
    return QuantizerResult(best.term(best.quantize(narrow)))


def _loss(weight: Tensor, grid: Grid, layout: Layout, power: float) -> Tensor:
    """``sum |w − q|^p`` of every block (block rows, groups), in units that all grids of the block share."""
    unit = layout.tiles(weight.abs()).amax(-1, keepdim=True)
    error = layout.tiles(weight - grid.dequantize(grid.quantize(weight))).abs()
    return (error / unit.masked_fill(unit == 0, torch.inf)).pow(power).sum(-1)


def _refit(weight: Tensor, grid: Grid, layout: Layout, power: float, beta: float) -> Grid:
    """One half-quadratic iteration: outliers out of the way, then zero points, then scales."""
    scales = grid.scales(torch.float32)
    divisor = layout.spread(scales)[:, : weight.shape[1]]
    divisor = divisor.masked_fill(divisor == 0, torch.inf)
    codes = grid.quantize(weight)
    unit = (weight - grid.dequantize(codes)) / divisor
    kept = weight / divisor - _shrink(unit, power, beta)  # w − e in units of the scale
    if grid.zero is not None and grid.format.has_zero:
        count = layout.tiles(torch.ones_like(weight)).sum(-1)
        mean = layout.tiles(codes.float() - kept).sum(-1) / count
        grid = replace(grid, zero=mean.round().clamp(0, grid.format.levels - 1).to(torch.uint8))
    levels = grid.dequantize(codes) / divisor
    energy = layout.tiles(levels.square()).sum(-1)
    ratio = layout.tiles(levels * kept).sum(-1) / energy.masked_fill(energy == 0, torch.inf)
    fitted = torch.where(ratio > 0, scales * ratio, scales)
    return with_scales(grid, fitted, layout)


def _shrink(error: Tensor, power: float, beta: float) -> Tensor:
    """Generalised soft threshold ``sign(x) max(|x| − |x|^(p−1) / beta, 0)``."""
    size = error.abs()
    threshold = size.masked_fill(size == 0, 1).pow(power - 1) / beta
    return error.sign() * (size - threshold).clamp_min(0)


def _better(first: Tensor, a: Grid, b: Grid) -> Grid:
    zero = None if a.zero is None or b.zero is None else torch.where(first, a.zero, b.zero)
    return replace(a, scale=torch.where(first, a.scale, b.scale), zero=zero)


register_quantizer("hqq", QuantizerEntry("half-quadratic fit of the grid, no data", "Badri and Shaji 2023", hqq))
