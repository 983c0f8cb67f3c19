"""Diagonal scalings of the inputs as transforms: AWQ's search and SmoothQuant's migration.

``W' = W diag(s)``, ``x' = x / s``, and ``Ŵ = Ŵ' diag(1 / s)`` with ``1 / s`` stored in 16 bits, unless it is folded
into what makes ``x`` (`tnc.models.fold`). W' is made from ``1 / s`` as stored, so the scaling itself loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tnc.decompose.transforms import Transformed, Wrap, transform_moments, unwrapped
from tnc.errors import RecipeError, StatsError
from tnc.formats import NumberFormat
from tnc.metric import Metric
from tnc.quant import rtn
from tnc.stats import LayerStats
from tnc.terms import Diagonal, Product, dense64

_RANGE = 1e4  # largest ratio of two scales: both ends stay normal in float16


@dataclass(frozen=True)
class AwqScaling:
    """``s = mean|x|^alpha``, alpha the one of a grid whose unclipped `rtn` has the least error in H.

    Attributes:
        format: number format that the search rounds to.
        grid: number of alphas ``0, 1/grid, ..., 1 - 1/grid``; alpha = 0 is no scaling, and then none is stored.

    Raises:
        RecipeError: if ``grid`` is below 1.
        StatsError: on use without statistics.

    Cost: ``grid`` times that of `rtn` and of a product with H.
    Source: AWQ (arXiv:2306.00978) section 3.2; differs in the exact H-error in the place of a sample's, and in
    searching each layer alone (jointly for layers that share inputs: `tnc.models.fold`).
    """

    format: NumberFormat
    grid: int = 20

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise RecipeError(f"AwqScaling(grid={self.grid}) must try at least one alpha; the paper has 20.")

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The scaled problem with the best alpha, which is among the choices."""
        if stats is None:
            raise StatsError("AWQ needs calibration statistics for its scales; pass stats=..., or leave it out.")
        errors = [
            awq_error(weight, stats, self.format, awq_scale(stats, step / self.grid)) for step in range(self.grid)
        ]
        best = errors.index(min(errors))
        found = scale_inputs(weight, stats, awq_scale(stats, best / self.grid)) if best else _unchanged(weight, stats)
        return replace(found, notes=_rms_note(stats), choices=(f"awq alpha = {best / self.grid:g}",))


@dataclass(frozen=True)
class Smoothing:
    """``s_j = mean|x_j|^alpha / max_i|W_ij|^(1 - alpha)``: outliers of the inputs move into the weight.

    In the full H a low-rank term does not
    change by it; in the Frobenius norm it takes up the outliers, and a quantizer sees what is left.

    Attributes:
        alpha: in [0, 1]: 0 levels the columns of the weight, 1 the inputs.

    Raises:
        RecipeError: for an alpha outside [0, 1].
        StatsError: on use without statistics.

    Source: SmoothQuant (arXiv:2211.10438) equation 4, as SVDQuant (arXiv:2411.05007) uses it; with mean|x| in the
    place of max|x|, which statistics do not hold.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"Smoothing(alpha={self.alpha}) is outside [0, 1]; 0.5 is SmoothQuant's.")

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The smoothed problem."""
        if stats is None:
            raise StatsError("Smoothing needs calibration statistics for its scales; pass stats=..., or leave it out.")
        largest = weight.double().abs().amax(0)
        scale = balanced(_magnitude(stats) ** self.alpha / _positive(largest) ** (1 - self.alpha))
        return replace(scale_inputs(weight, stats, scale), notes=_rms_note(stats))


def awq_scale(stats: LayerStats, alpha: float) -> Tensor:
    """(n,) ``mean|x|^alpha``, divided by the geometric mean of its extremes; float64, at most 1e4 apart."""
    return balanced(_magnitude(stats) ** alpha)


def awq_error(weight: Tensor, stats: LayerStats, format: NumberFormat, scale: Tensor) -> float:
    """Squared H-error of ``rtn(W diag(s)) diag(1 / s)`` without clipping, products in float32."""
    inner = scale_inputs(weight, stats, scale)
    term = rtn(inner.weight.float(), format, stats=inner.stats, clip_ratios=(1.0,))
    error = weight.double() - dense64(inner.wrap(term))
    return Metric.full(stats).squared_norm(error.float())


def scale_inputs(weight: Tensor, stats: LayerStats | None, scale: Tensor) -> Transformed:
    """The problem ``W' = W diag(s)``, ``x' = x / s``, with ``1 / s`` as stored in float16.

    Args:
        weight: (m, n).
        stats: statistics of the layer, or ``None``.
        scale: (n,) s, within 1e-4 to 1e4.
    """
    back = Diagonal((1 / scale.double()).half())
    inner = weight.double() / back.vector.double()
    if stats is None:
        return Transformed(inner, None, _behind(back))
    wide = Diagonal(back.vector.double())
    heldout = None if stats.heldout is None else transform_moments(stats.heldout, wide)
    return Transformed(
        inner, replace(stats, inputs=transform_moments(stats.inputs, wide), heldout=heldout), _behind(back)
    )


def _behind(diagonal: Diagonal) -> Wrap:
    return lambda operator: Product((operator, diagonal))


def _unchanged(weight: Tensor, stats: LayerStats | None) -> Transformed:
    return Transformed(weight.double(), stats, unwrapped)


def _magnitude(stats: LayerStats) -> Tensor:
    """(n,) mean ``|x|``, or its root mean square where only H is known; dead inputs get the smallest."""
    known = stats.inputs.mean_abs
    return _positive(stats.inputs.diagonal.double().clamp_min(0).sqrt() if known is None else known.double())


def _rms_note(stats: LayerStats) -> tuple[str, ...]:
    return () if stats.inputs.mean_abs is not None else ("scales from the root mean square: mean |x| is not known",)


def _positive(values: Tensor) -> Tensor:
    """Zeros raised to the smallest positive entry; ones where there is none."""
    positive = values[values > 0]
    return values.clamp_min(float(positive.min()) if len(positive) else 1.0)


def balanced(scale: Tensor) -> Tensor:
    """Divided by the geometric mean of its extremes, and clamped around 1."""
    centre = (scale.max() * scale.min()).sqrt()
    return (scale / centre).clamp(_RANGE**-0.5, _RANGE**0.5)
