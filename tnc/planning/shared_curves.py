"""Options with one right factor for the layers that see one input (q, k and v; gate and up).

Such an option is chosen by all layers of its group or by none; its error and its share of the bits are those of each
layer, so that they add up as those of every other option do (MATH.md section 3, `tnc.decompose.shared`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tnc.decompose.factor_formats import FactorFormats
from tnc.decompose.factors import FactorTarget, quantize_shared_factors
from tnc.decompose.shared import charged_bits, shared_factors
from tnc.planning.allocate import Menu, front
from tnc.planning.curves import ErrorCurve, LayerCurves, Option, curves_of
from tnc.planning.fits import FittedBase, LayerFits, fit_bases
from tnc.planning.portfolio import PLAIN, Choice, Portfolio
from tnc.planning.ruler import Remainder
from tnc.stats import LayerStats
from tnc.terms import Expression, LowRank, Product, Sum, dense64

_OWN = 0.95  # of their cost: own terms are the better ones on calibration tokens, and nearly always on others

Hull = Callable[[int], float]
Options = list[list[Option]]  # of each layer of the group, by rising rank


def input_groups(stats: Mapping[str, LayerStats]) -> list[list[str]]:
    """Layer names that share one `Moments` object, which is how `calibrate` says that they see one input."""
    found: dict[int, list[str]] = {}
    for name, each in stats.items():
        found.setdefault(id(each.inputs), []).append(name)
    return list(found.values())


def measure_groups(
    weights: Sequence[Tensor], stats: Sequence[LayerStats], portfolio: Portfolio, *, dtype: torch.dtype | None = None
) -> list[LayerCurves]:
    """Every option of layers that see one input: each one's own, and those with a shared right factor.

    Args:
        weights: (m_i, n) each.
        stats: of each, with one and the same ``inputs`` object.
        portfolio: what is tried; without ``shared`` this is `tnc.planning.measure_curves` layer by layer.
        dtype: of plain factors and dense layers; ``None`` is that of the first weight.

    Raises:
        ShapeError, NonFiniteError, StatsError: as `tnc.planning.measure_curves`.

    Shared options that are not below the hull of the layers' own are left out: no plan on the hull would take them.
    Those that would be above it at 95 % of what the layers' own terms of that rank cost are not measured: on the
    calibration tokens a layer's own term is the better one, and on others a shared one is hardly better.

    Cost: beside the layers' own curves two eigenproblems of size n for each compensated base without transforms that
    may pay at some rank, and one rounding for each rank and format that may.
    """
    fits = [fit_bases(w, s, portfolio, dtype=dtype) for w, s in zip(weights, stats, strict=True)]
    return with_shared(fits, [curves_of(each) for each in fits])


def with_shared(fits: Sequence[LayerFits], curves: Sequence[LayerCurves]) -> list[LayerCurves]:
    """Curves of layers that see one input, with the options of shared right factors added; see `measure_groups`.

    Args:
        fits: the bases of each layer, by one portfolio.
        curves: each layer's own, from `tnc.planning.curves.curves_of`.
    """
    if not fits[0].portfolio.shared or len(fits) < 2:
        return list(curves)
    extra = _shared_curves(fits, curves)
    return [replace(own, curves=(*own.curves, *more)) for own, more in zip(curves, extra, strict=True)]


def measure_layers(
    weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats], portfolio: Portfolio, *,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, LayerCurves]]:  # fmt: skip
    """Curves of all layers by name, those of an input group one after another as soon as it is measured.

    Args:
        weights: by name.
        stats: of those layers at least.
        portfolio: as in `measure_groups`.
        dtype: as in `measure_groups`.
    """
    for names in input_groups({name: stats[name] for name in weights}):
        group = [weights[name] for name in names], [stats[name] for name in names]
        yield from zip(names, measure_groups(*group, portfolio, dtype=dtype), strict=True)


def _hull(curves: Sequence[LayerCurves]) -> Hull:
    """What the layers' own options cost together at best, at given bits of all of them."""
    options = [option for each in curves for option in each.options]
    first = np.concatenate([[0], np.cumsum([len(each.options) for each in curves])])
    cost, bits = np.array([_cost(o) for o in options]), np.array([float(o.bits) for o in options])
    found = front(Menu(first, cost, bits))
    return lambda used: math.inf if used < found.usage[0] else float(np.interp(used, found.usage, found.cost))


def _cost(option: Option) -> float:
    """What a planner would minimise."""
    return option.heldout_error**2 if math.isnan(option.heldout_nats) else option.heldout_nats


def _least(curves: Sequence[LayerCurves], base: str) -> dict[int, float]:
    """By rank, what shared terms on a base are taken not to undercut: the layers' own terms of it, all together."""
    found: dict[int, list[float]] = {}
    for each in (c for layer in curves for c in layer.curves if c.base == base and c.factors == PLAIN):
        for option in each.options:
            found.setdefault(option.choice.rank, []).append(_OWN * _cost(option))
    return {rank: sum(costs) for rank, costs in found.items() if len(costs) == len(curves)}


def _shared_curves(fits: Sequence[LayerFits], curves: Sequence[LayerCurves]) -> list[list[ErrorCurve]]:
    portfolio, hull = fits[0].portfolio, _hull(curves)
    found: list[list[ErrorCurve]] = [[] for _ in fits]
    for name, base in portfolio.bases.items():
        if not base.compensated or base.transforms or any(name not in each.bases for each in fits):
            continue
        group = _Group(fits, name, [each.bases[name] for each in fits], hull, _least(curves, name))
        by_format = {PLAIN: group.plain()} | {f: group.rounded(f) for f in portfolio.rounded}
        for factors, layers in by_format.items():
            kept = [o for o in zip(*layers, strict=True) if sum(map(_cost, o)) < hull(sum(each.bits for each in o))]
            for at, options in enumerate(zip(*kept, strict=True)):
                found[at].append(ErrorCurve(name, factors, options, shared=True))
    return found


@dataclass(frozen=True, eq=False)
class _Group:
    """One base of every layer of a group; ``hull`` and ``least`` say which ranks may pay."""

    fits: Sequence[LayerFits]
    name: str
    bases: Sequence[FittedBase]
    hull: Hull
    least: Mapping[int, float]

    @property
    def portfolio(self) -> Portfolio:
        return self.fits[0].portfolio

    @property
    def rows(self) -> int:
        return sum(len(each.weight) for each in self.fits)

    @property
    def largest(self) -> int:
        """The largest rank that every layer has."""
        return min(min(each.weight.shape) for each in self.fits)

    @cached_property
    def remainders(self) -> list[Remainder]:
        return [each.ruler.remainder(each.residual) for each in self.bases]

    @property
    def residuals(self) -> list[Tensor]:
        return [each.residual for each in self.remainders]

    @cached_property
    def _targets(self) -> list[FactorTarget]:
        return [FactorTarget(d, each.ruler.metric) for d, each in zip(self.residuals, self.bases, strict=True)]

    @cached_property
    def base_bits(self) -> int:
        """Bits that the layers store without factors."""
        return 0 if self.portfolio.bases[self.name].stage is None else sum(b.term.storage_bits for b in self.bases)

    @cached_property
    def rest(self) -> int:
        """Bits left for factors below the limit of all layers together."""
        return sum(each.limit for each in self.fits) - self.base_bits

    def _may_pay(self, rank: int, bits: int) -> bool:
        """Whether factors of ``bits`` may come below the hull of the layers' own options."""
        return self.least.get(rank, 0.0) < self.hull(self.base_bits + bits)

    def plain(self) -> Options:
        """Factors in the model's dtype, if the portfolio has those, at every rank that stores less than the limit."""
        dtype = self.fits[0].dtype
        per_rank = (self.rows + self.fits[0].weight.shape[1]) * dtype.itemsize * 8
        useful = self.portfolio.plain_ranks(min(self.largest, -(-self.rest // per_rank) - 1))
        ranks = [k for k in useful if self._may_pay(k, k * per_rank)]
        if not ranks:
            return [[] for _ in self.fits]
        lefts, right = self._factors(ranks[-1])
        right = right.to(dtype)
        terms = [LowRank(left.to(dtype), right) for left in lefts]
        errors = [each.prefix_errors(term) for each, term in zip(self.remainders, terms, strict=True)]
        found: Options = [[] for _ in self.fits]
        for k in ranks:
            shared = right[:k]
            bits = self._bits([LowRank(t.left[:, :k], shared) for t in terms])
            for at, stored in enumerate(bits):
                found[at].append(Option(Choice(self.name, k, shared=True), stored, *(float(e[k]) for e in errors[at])))
        return found

    def rounded(self, factors: str) -> Options:
        """Factors in a number format, each rank rounded and measured."""
        formats = self.portfolio.rounded[factors]
        found: Options = [[] for _ in self.fits]
        metrics = [b.ruler.metric for b in self.bases]
        for k in self._ranks(formats):
            lefts, right = self._components
            made = quantize_shared_factors(
                self._targets, [left[:, :k] for left in lefts], right[:k], metrics, formats, method="gptq"
            )
            stored = dense64(made.right)
            terms = [Product((left, made.right)) for left in made.lefts]
            for at, (bits, left) in enumerate(zip(self._bits(terms), made.lefts, strict=True)):
                errors = self.remainders[at].errors_without(LowRank(dense64(left), stored))
                found[at].append(Option(Choice(self.name, k, factors, shared=True), bits, *errors))
        return found

    def _ranks(self, formats: FactorFormats) -> list[int]:
        shape = (self.rows, self.fits[0].weight.shape[1])
        ranks = self.portfolio.ranks_within(formats, shape, self.largest, self.rest)
        return [k for k in ranks if self._may_pay(k, formats.stored_bits(shape, k))]

    @cached_property
    def _components(self) -> tuple[list[Tensor], Tensor]:
        """What every format rounds the first components of."""
        most = max((k for formats in self.portfolio.rounded.values() for k in self._ranks(formats)), default=0)
        return self._factors(most)

    def _factors(self, rank: int) -> tuple[list[Tensor], Tensor]:
        return shared_factors(self.residuals, [b.ruler.metric for b in self.bases], rank)

    def _bits(self, terms: Sequence[Expression]) -> list[int]:
        """What each layer is charged."""
        if self.portfolio.bases[self.name].stage is None:
            return charged_bits(terms)
        return charged_bits([Sum((b.term, t)) for b, t in zip(self.bases, terms, strict=True)])
