"""`FormStage`: any structured form as one stage of a decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tnc.decompose.sizes import BitsPerWeight, RelativeError, Size
from tnc.decompose.stages import Fitted, MetricOf, Target
from tnc.errors import BudgetError
from tnc.metric import Metric
from tnc.terms import Expression


class Form(Protocol):
    """A decomposer of this package with its own options bound: ``partial(blast, blocks=(8, 8))``."""

    def __call__(
        self, weight: Tensor, rank: Size, /, *, metric: Metric | None, dtype: torch.dtype | None
    ) -> Expression:
        """The term for ``weight``."""


@dataclass(frozen=True)
class FormStage:
    """A structured term for what the other terms leave over.

    Attributes:
        form: a decomposer of `tnc.decompose.forms`, its blocks or modes bound with `functools.partial`.
        rank: as the decomposer takes it; `RelativeError` is relative to the whole weight, `BitsPerWeight` counts
            the other terms.
        metric: the metric made of the statistics; without statistics it is the Frobenius norm.
        dtype: of the stored factors; ``None`` is the dtype of the weight.
    """

    form: Form
    rank: Size
    metric: MetricOf = Metric.auto
    dtype: torch.dtype | None = None

    def fit(self, target: Target) -> Fitted:
        """The term for the residual."""
        metric = Metric() if target.stats is None else self.metric(target.stats)
        size = _for_residual(self.rank, target, metric)
        dtype = self.dtype or target.weight.dtype
        replaced = target.stats is None and self.metric not in (Metric.auto, Metric.identity)
        notes = ("no statistics: structured form in the Frobenius norm",) if replaced else ()
        return Fitted(self.form(target.residual, size, metric=metric, dtype=dtype), fallbacks=notes)


def _for_residual(size: Size, target: Target, metric: Metric) -> Size:
    """A size that means for the residual what ``size`` means for the weight."""
    if isinstance(size, RelativeError):
        residual, weight = metric.norm(target.residual), metric.norm(target.weight.double())
        share = size.value * weight / residual if residual > 0 else 1.0
        return RelativeError(share) if share < 1 else 0
    if isinstance(size, BitsPerWeight):
        spent = target.spent_bits / target.weight.numel()
        if spent >= size.value:
            raise BudgetError(
                f"BitsPerWeight({size.value}) is spent: the other terms store {spent:.4f} bits per weight. Ask for "
                "more, or make the other terms smaller."
            )
        return BitsPerWeight(size.value - spent)
    return size
