"""`WeightedProblem`: a weight with the statistics and the metric of its layer, rebuilt from one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnc.errors import RecipeError, StatsError
from tnc.metric import Metric
from tnc.stats import LayerStats, Moments
from tnc.testing.matrices import make_inputs, make_weight, second_moment
from tnc.testing.oracle import largest_gain

_METRICS: dict[str, Callable[[LayerStats], Metric]] = {
    "identity": Metric.identity,
    "rms": Metric.rms,
    "mean_abs": Metric.mean_abs,
    "full": Metric.full,
    "fisher": Metric.fisher,
}

METRICS = tuple(_METRICS)
"""Names of the metrics of a problem: the constructors of `tnc.metric.Metric`."""


@dataclass(frozen=True, eq=False, repr=False)
class WeightedProblem:
    """What a decomposer is given; its ``repr`` is the call that rebuilds it.

    Attributes:
        weight: (out_features, in_features).
        stats: second moments of the inputs, with or without gradients and held-out tokens.
        metric: made from ``stats``.
        scale: largest norm in ``metric`` of any matrix as long as ``weight``,
            ``||weight||_F sqrt(||G|| ||H||)``: rounding errors are relative to it.
    """

    weight: Tensor
    stats: LayerStats
    metric: Metric
    scale: float
    _call: str = field(default="")

    def __repr__(self) -> str:
        return self._call or f"WeightedProblem(weight {tuple(self.weight.shape)} {self.weight.dtype})"


def make_problem(
    shape: tuple[int, int],
    *,
    spectrum: str = "flat",
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    hessian: str = "full",
    input_scale: float = 1.0,
    gradient: str | None = None,
    heldout: bool = False,
    metric: str = "full",
    seed: int = 0,
) -> WeightedProblem:
    """The problem that these few words describe, the same one every time.

    Args:
        shape: (out_features, in_features).
        spectrum: kind of weight, as in `make_weight`.
        scale: largest absolute entry of the weight.
        dtype: of the weight.
        hessian: kind of ``H``, as in `make_hessian`.
        input_scale: factor on the inputs.
        gradient: kind of ``G``, or ``None`` for none.
        heldout: whether the statistics have a held-out share.
        metric: one of `METRICS`; ``fisher`` needs ``gradient``.
        seed: of everything random.

    Raises:
        RecipeError: for an unknown spectrum, kind or metric.
        StatsError: for ``metric="fisher"`` without ``gradient``.
    """
    call = (
        f"tnc.testing.make_problem({tuple(shape)}, spectrum={spectrum!r}, scale={scale!r}, dtype={dtype}, "
        f"hessian={hessian!r}, input_scale={input_scale!r}, gradient={gradient!r}, heldout={heldout}, "
        f"metric={metric!r}, seed={seed})"
    )
    if metric not in _METRICS:
        raise RecipeError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}.")
    if metric == "fisher" and gradient is None:
        raise StatsError("make_problem(metric='fisher') got gradient=None; pass a kind such as gradient='full'.")
    weight = make_weight(shape, spectrum=spectrum, scale=scale, dtype=dtype, seed=seed)
    stats = LayerStats(
        _moments(shape[1], hessian, input_scale, seed + 1),
        _moments(shape[1], hessian, input_scale, seed + 2) if heldout else None,
        None if gradient is None else _moments(shape[0], gradient, 1.0, seed + 3),
    )
    chosen = _METRICS[metric](stats)
    size = float(weight.double().norm()) * largest_gain(chosen)
    return WeightedProblem(weight, stats, chosen, size, call)


def _moments(size: int, kind: str, scale: float, seed: int) -> Moments:
    inputs = make_inputs(size, kind=kind, scale=scale, seed=seed)
    return Moments(second_moment(inputs), inputs.abs().mean(0), inputs.shape[0])
