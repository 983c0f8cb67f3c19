"""Stages: how one term of a sum is fitted to what the other terms leave over.

Every published recipe is a short tuple of stages (`tnc.decompose.catalogue`). A stage is data; its ``fit`` is
a thin call into ``tnc.quant`` or ``tnc.decompose.low_rank``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tnc.column_space import Solver
from tnc.decompose.factor_formats import FactorFormats
from tnc.decompose.gate import Gate, describe, heldout_error
from tnc.decompose.low_rank import fit_low_rank
from tnc.decompose.quantized_low_rank import fit_quantized_low_rank
from tnc.decompose.sizes import Size
from tnc.errors import check_same_shape
from tnc.formats import NumberFormat
from tnc.metric import Metric
from tnc.quant import CLIP_RATIOS, quantizer, refine
from tnc.stats import LayerStats
from tnc.terms import Dense, Expression

MetricOf = Callable[[LayerStats], Metric]


@dataclass(frozen=True, eq=False)
class Target:
    """What a stage is asked to fit.

    Attributes:
        residual: (m, n) ``weight`` minus the other terms as stored, float64.
        weight: (m, n) the dense weight.
        stats: calibration statistics, or ``None``.
        spent_bits: bits the other terms store, or will.
        sweep: how often all stages were fitted before.
    """

    residual: Tensor
    weight: Tensor
    stats: LayerStats | None
    spent_bits: int
    sweep: int = 0


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted term, the damping used, every fallback taken, and the H-error theory promises for the sum so far.

    ``choices`` says what searches settled on.
    """

    term: Expression
    damping: float | None = None
    fallbacks: tuple[str, ...] = ()
    guaranteed_error: float | None = None
    choices: tuple[str, ...] = ()


class Stage(Protocol):
    """Anything that can fit a term to a `Target`."""

    def fit(self, target: Target) -> Fitted:
        """The fitted term."""


@dataclass(frozen=True)
class QuantizeStage:
    """Quantized base.

    Attributes:
        format: number format of the codes.
        method: a name of `tnc.quant.QUANTIZERS`, such as ``"gptq"`` or ``"rtn"``.
        clip_ratios: candidate ranges of a group as ratios of its full range; ``(1.0,)`` is no search.
        damping: first multiple of ``mean(diag H)`` of the methods that factor H.
        options: further options of the method, as its entry lists them.
        refine: sweeps of `tnc.quant.refine` afterwards, in ``G ⊗ H`` (``H`` without gradients).

    Raises:
        RecipeError: for an unknown method (lists the names), or an option that the method does not take.
    """

    format: NumberFormat
    method: str = "gptq"
    clip_ratios: Sequence[float] = field(default=CLIP_RATIOS)
    damping: float = 0.01
    options: Mapping[str, Any] = field(default_factory=dict)
    refine: int = 0

    def __post_init__(self) -> None:
        quantizer(self.method, self.options)

    def fit(self, target: Target) -> Fitted:
        """Quantize the residual."""
        entry = quantizer(self.method)
        shared = {"clip_ratios": self.clip_ratios, "damping": self.damping}
        options = {k: v for k, v in shared.items() if k in entry.options} | dict(self.options)
        result = entry.run(target.residual, target.stats, self.format, **options)
        term = refine(target.residual, result.term, target.stats, sweeps=self.refine)
        return Fitted(term, result.damping, result.fallbacks)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits the term will take for a weight of this shape."""
        return self.format.stored_bits(shape)


@dataclass(frozen=True)
class LowRankStage:
    """Low-rank term by the closed form of MATH.md section 1.

    Attributes:
        rank: an int, `Rank`, `RelativeError` or `BitsPerWeight` (the last counts the other terms).
        metric: the metric made of the statistics; without statistics it is the Frobenius norm, which is
            reported as a fallback unless that is what `Metric.auto` or `Metric.identity` mean. A `Gate` fits in
            several and keeps the one of least error on held-out tokens.
        solver: `Exact` or `Subspace`; ``None`` chooses by size and rank.
        dtype: of the stored factors; ``None`` is the dtype of the weight.
        factor_format: number format of the stored factors (`tnc.decompose.factors`); one format stands for both,
            with one group a row in ``left``. ``None`` stores them in ``dtype``.
        factor_method: a name of `tnc.quant.QUANTIZERS` for the factors.
        first: stage that takes this one's place in the first sweep, such as one of another rank or metric: what
            alternation starts from decides more than the number of its sweeps. It stores factors as this one.

    Raises:
        RecipeError: for an unknown factor method.
    """

    rank: Size
    metric: MetricOf | Gate = Metric.auto
    solver: Solver | None = None
    dtype: torch.dtype | None = None
    factor_format: NumberFormat | FactorFormats | None = None
    factor_method: str = "gptq"
    first: LowRankStage | None = None

    def __post_init__(self) -> None:
        quantizer(self.factor_method)

    def fit(self, target: Target) -> Fitted:
        """Best low-rank term for the residual."""
        if self.first is not None and target.sweep == 0:
            return self.started().fit(target)
        if isinstance(self.metric, Gate):
            return self._fit_gated(target, self.metric)
        metric = Metric() if target.stats is None else self.metric(target.stats)
        replaced = target.stats is None and self.metric not in (Metric.auto, Metric.identity)
        notes = ("no statistics: low rank in the Frobenius norm",) if replaced else ()
        if self.factor_format is not None:
            return self._fit_quantized(target, metric, notes, FactorFormats.of(self.factor_format))
        found = fit_low_rank(
            target.residual, target.weight, self.rank, metric, solver=self.solver,
            dtype=self.dtype or target.weight.dtype, spent_bits=target.spent_bits,
        )  # fmt: skip
        in_full_hessian = metric.gradient is None and self.metric in (Metric.auto, Metric.full)
        if target.stats is not None and not in_full_hessian:
            return Fitted(found.term)
        tail = max(metric.squared_norm(target.residual) - found.captured, 0.0) ** 0.5
        guaranteed = tail / max(metric.norm(target.weight.double()), 1e-300)
        return Fitted(found.term, fallbacks=notes, guaranteed_error=guaranteed)

    def started(self) -> LowRankStage:
        """The stage of the first sweep: ``first``, storing its factors as this one does."""
        storage = {name: getattr(self, name) for name in ("dtype", "factor_format", "factor_method")}
        return self if self.first is None else replace(self.first, **storage)

    def _fit_gated(self, target: Target, gate: Gate) -> Fitted:
        stats = target.stats
        if stats is None or stats.heldout is None:
            found = replace(self, metric=Metric.auto, first=None).fit(target)
            return replace(found, fallbacks=("no held-out tokens to choose the metric by: all of H", *found.fallbacks))
        fits = {
            name: replace(self, metric=metric, first=None).fit(target) for name, metric in gate.candidates().items()
        }
        errors = {name: heldout_error(target.residual, target.weight, f.term, stats) for name, f in fits.items()}
        return replace(fits[min(errors, key=lambda name: errors[name])], choices=(describe(errors),))

    def _fit_quantized(self, target: Target, metric: Metric, notes: tuple[str, ...], formats: FactorFormats) -> Fitted:
        found = fit_quantized_low_rank(
            target.residual, target.weight, self.rank, metric, formats, method=self.factor_method,
            solver=self.solver, spent_bits=target.spent_bits,
        )  # fmt: skip
        return Fitted(found.term, found.damping, notes + found.fallbacks)


@dataclass(frozen=True, eq=False)
class GivenStage:
    """A base that exists already, such as a layer that another tool quantized: kept bit for bit.

    Attributes:
        term: of the layer's shape.
    """

    term: Expression = field(repr=False)

    def fit(self, target: Target) -> Fitted:
        """The term itself."""
        check_same_shape(self.term.shape, tuple(target.weight.shape), "the given base", "weight")
        return Fitted(self.term)


@dataclass(frozen=True)
class DenseStage:
    """The residual stored as it is: the form a layer keeps when nothing smaller pays.

    Attributes:
        dtype: of the stored matrix; ``None`` is the dtype of the weight.
    """

    dtype: torch.dtype | None = None

    def fit(self, target: Target) -> Fitted:
        """A dense copy of the residual."""
        return Fitted(Dense(target.residual.to(self.dtype or target.weight.dtype)))
