"""The bases of a portfolio fitted to one layer, once: its own curves and those of shared factors start from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnc.decompose import Target
from tnc.decompose.transforms import Transform
from tnc.errors import FormatError, RankError, check_matrix
from tnc.planning.portfolio import Choice, Portfolio
from tnc.planning.ruler import Ruler
from tnc.stats import LayerStats
from tnc.terms import Expression, dense64

_NEAR_EXACT = 0.01  # relative error; int8 is at 0.003 to 0.006, int4 at 0.03 to 0.07


@dataclass(frozen=True, eq=False)
class FittedBase:
    """One base of one layer.

    Attributes:
        term: as stored; a term of rank 0 where the base stores nothing.
        ruler: measures in its basis.
    """

    term: Expression
    ruler: Ruler

    @property
    def residual(self) -> Tensor:
        """(m, n) what the base leaves over, float64, in its basis."""
        return self.ruler.weight - dense64(self.term)

    @cached_property
    def errors(self) -> tuple[float, float, float, float]:
        """nats, held-out nats, error, held-out error of the base alone."""
        return self.ruler.remainder(self.residual).errors


@dataclass(frozen=True, eq=False)
class LayerFits:
    """Everything that is fitted before ranks are looked at.

    Attributes:
        weight: (out_features, in_features).
        stats: of the layer.
        portfolio: what is tried.
        dtype: of plain factors and dense layers.
        bases: by name, those that fit the shape.
        notes: which bases were left out, and why.
    """

    weight: Tensor
    stats: LayerStats
    portfolio: Portfolio
    dtype: torch.dtype
    bases: Mapping[str, FittedBase]
    notes: tuple[str, ...]

    @cached_property
    def limit(self) -> int:
        """Bits of the smallest near exact base without low-rank terms (int8, or dense): more is never worth a rank."""
        single = [b.ruler.wrap(b.term).storage_bits for name, b in self.bases.items()
                  if not self.portfolio.bases[name].compensated and b.errors[-1] <= _NEAR_EXACT]  # fmt: skip
        return min([self.weight.numel() * self.dtype.itemsize * 8, *single])


def fit_bases(
    weight: Tensor, stats: LayerStats, portfolio: Portfolio, *, dtype: torch.dtype | None = None,
    known: Mapping[str, Expression] | None = None,
) -> LayerFits:  # fmt: skip
    """Every base of the portfolio, fitted to one layer.

    Args:
        weight: (out_features, in_features), any float dtype.
        stats: its calibration statistics.
        portfolio: a base that does not fit the shape is left out with a note.
        dtype: of plain factors and dense layers; ``None`` is that of the weight.
        known: terms of bases that were fitted to this layer before, by the same portfolio; not fitted again.

    Raises:
        ShapeError, NonFiniteError, StatsError: for a bad weight or statistics of another layer.

    Cost: one fit a base that is not known.
    """
    check_matrix(weight, "weight")
    stats.check_weight(weight)
    rulers: dict[tuple[Transform, ...], Ruler] = {}
    bases, notes = {}, []
    for name, base in portfolio.bases.items():
        if base.transforms not in rulers:
            rulers[base.transforms] = Ruler(weight, base.transforms, stats)
        ruler = rulers[base.transforms]
        if known is not None and name in known:
            bases[name] = FittedBase(known[name], ruler)
            continue
        (stage,) = portfolio.stages(Choice(name), dtype)
        try:
            bases[name] = FittedBase(stage.fit(Target(ruler.weight, ruler.source, ruler.stats, 0)).term, ruler)
        except (FormatError, RankError) as error:
            notes.append(f"{name} left out: {error}")
    return LayerFits(weight, stats, portfolio, dtype or weight.dtype, bases, tuple(notes))
