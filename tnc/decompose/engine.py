"""The engine: block-coordinate descent over stages, best iterate kept.

``term_k <- stage_k.fit(W - sum of the other terms)`` for each stage in turn, for a number of sweeps. LoftQ
(arXiv:2310.08659) and CALDERA (arXiv:2405.18886) are two stages and several sweeps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tnc.decompose.known_fits import KnownFits
from tnc.decompose.report import LayerReport, measure, price_of
from tnc.decompose.sizes import check_useful
from tnc.decompose.stages import Fitted, LowRankStage, QuantizeStage, Stage, Target
from tnc.decompose.transforms import Transform, Transformed
from tnc.errors import RecipeError, check_matrix
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Expression, Sum, dense64

# Relative fall of the error below which another sweep is not worth its time.
_LEAST_GAIN = 1e-4


@dataclass(frozen=True, eq=False)
class Decomposition:
    """An operator that stands for a weight, and the report of what it cost."""

    operator: Expression
    report: LayerReport


@dataclass(frozen=True, eq=False)
class Attempt:
    """An operator that is not measured yet, and what its report will say of its making.

    Attributes:
        weight: that it stands for.
        stats: of the layer, or ``None``.
        operator: as stored.
        notes: arguments of `measure`, among them ``seconds`` and ``choices``.
    """

    weight: Tensor
    stats: LayerStats | None
    operator: Expression
    notes: Mapping[str, Any]

    @cached_property
    def price(self) -> float:
        """As `tnc.decompose.report.price_of`."""
        return price_of(self.weight, self.operator, self.stats)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the entries of the weight."""
        return self.operator.storage_bits / self.weight.numel()

    def measured(self) -> Decomposition:
        """With its report, which costs more than a price (`measure`)."""
        return Decomposition(self.operator, measure(self.weight, self.operator, self.stats, **self.notes))


def decompose(
    weight: Tensor, stages: Sequence[Stage], stats: LayerStats | None = None, *, sweeps: int = 1,
    transforms: Sequence[Transform] = (),
) -> Decomposition:  # fmt: skip
    """Factor ``weight`` into the sum of one term a stage.

    Args:
        weight: (out_features, in_features), any float dtype; not changed, not aliased.
        stages: at least one; fitted in this order.
        stats: calibration statistics of the layer; without them errors are in the Frobenius norm.
        sweeps: rounds over the stages, at most: after a round that lowers the error by less than 0.01 % no other
            follows. Of the terms after each fit, those of smallest error in ``G ⊗ H`` (``H`` without gradients)
            as stored are kept.
        transforms: changes of basis, the first outermost; the stages see the inner problem only
            (`tnc.decompose.transforms`).

    Returns:
        The operator (a `Sum`, or the single term, wrapped by the transforms) and its report, measured on the
        whole operator against ``weight``.

    Raises:
        RecipeError: without stages or with ``sweeps < 1``.
        RankError: also for a low-rank stage whose rank is above mn/(m+n), unless it is a `Rank` that is forced.
        NonFiniteError, ShapeError, StatsError, RankError, FormatError, BudgetError: as the stages say.
    """
    return attempt(weight, stages, KnownFits.of(weight, stats), sweeps=sweeps, transforms=transforms).measured()


def attempt(
    weight: Tensor, stages: Sequence[Stage], known: KnownFits, *, sweeps: int = 1, transforms: Sequence[Transform] = ()
) -> Attempt:
    """`decompose` without a report; what is ``known`` is not fitted again, and what is fitted is added to it."""
    check_matrix(weight, "weight")
    if not stages or sweeps < 1:
        raise RecipeError(f"decompose got {len(stages)} stages and sweeps={sweeps}; expected at least one of each.")
    for stage in stages:
        if isinstance(stage, LowRankStage):
            check_useful(stage.rank, (weight.shape[0], weight.shape[1]), "LowRankStage")
    assert known.weight is weight, "what is known is of this layer"
    if known.stats is not None:
        known.stats.check_weight(weight)
    start = time.perf_counter()
    inner = known.inner(transforms)
    fitted = _descend(inner, inner.weight.to(weight.dtype) if transforms else weight, stages, sweeps, known)
    operator = inner.wrap(fitted[0].term if len(fitted) == 1 else Sum(tuple(f.term for f in fitted)))
    notes = {
        "damping": max((f.damping for f in fitted if f.damping is not None), default=None),
        "fallbacks": inner.notes + tuple(note for f in fitted for note in f.fallbacks),
        "guaranteed_error": fitted[-1].guaranteed_error,
        "seconds": time.perf_counter() - start,
        "choices": inner.choices + tuple(choice for f in fitted for choice in f.choices),
    }
    return Attempt(weight, known.stats, operator, notes)


def _descend(
    inner: Transformed, weight: Tensor, stages: Sequence[Stage], sweeps: int, known: KnownFits
) -> list[Fitted]:
    """The best iterate's terms; ``weight`` is the inner weight in the dtype of the layer's."""
    stats = inner.stats
    metric = Metric() if stats is None else Metric.auto(stats)
    current: list[Fitted | None] = [None] * len(stages)
    values = [torch.zeros((), dtype=torch.float64)] * len(stages)  # each term as stored, densely
    best: tuple[float, list[Fitted]] | None = None
    for sweep in range(sweeps):
        before = None if best is None else best[0]
        for k, stage in enumerate(stages):
            residual = inner.weight - sum(values[i] for i in range(len(stages)) if i != k)
            spent = inner.storage_bits + bits_of_others(k, stages, current, (weight.shape[0], weight.shape[1]))
            target = Target(residual, weight, stats, spent, sweep)
            current[k] = found = stage.fit(target) if sweep else known.fit(stages[: k + 1], target)
            values[k] = dense64(found.term)
            complete = [f for f in current if f is not None]
            if sweeps == 1 or len(complete) < len(stages):
                continue
            error = metric.norm(residual - values[k])
            if best is None or error < best[0]:
                best = (error, complete)
        if sweeps == 1:
            return complete
        assert best is not None, "a sweep fits every stage"
        if before is not None and best[0] > (1 - _LEAST_GAIN) * before:
            break
    assert best is not None, "sweeps is at least 1"
    return best[1]


def bits_of_others(k: int, stages: Sequence[Stage], current: Sequence[Fitted | None], shape: tuple[int, int]) -> int:
    """Bits the other terms store; those of a quantized base are known before it is fitted."""
    bits = 0
    for i, (stage, fitted) in enumerate(zip(stages, current, strict=True)):
        if i != k and fitted is not None:
            bits += fitted.term.storage_bits
        elif i != k and isinstance(stage, QuantizeStage):
            bits += stage.stored_bits(shape)
    return bits
