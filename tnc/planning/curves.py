"""Error curves of a layer: what every option stores and costs, measured once, for any number of budgets.

Each base of the portfolio is fitted once. The low-rank terms on its residual need no fit of their own: the first k
components of the largest one are the best term of rank k, so one pass gives the error of every rank, of the tensors
as stored, in ``G ⊗ H`` and in H, on the calibration and on the held-out tokens (MATH.md section 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnc.decompose import Target
from tnc.decompose.factors import FactorFormats, quantize_factors
from tnc.decompose.low_rank import fit_low_rank
from tnc.decompose.transforms import Transform, Transformed, apply_transforms
from tnc.errors import FormatError, check_matrix
from tnc.metric import Metric
from tnc.planning.portfolio import PLAIN, Choice, Portfolio
from tnc.stats import LayerStats
from tnc.terms import Expression, LowRank, Sum, dense64


@dataclass(frozen=True)
class Option:
    """One choice of one layer, measured on the tensors as stored.

    Attributes:
        choice: base, rank, factors.
        bits: stored bits, by the term that would be written.
        nats: ``½ tr(Eᵀ G E H)`` on the calibration tokens' H; NaN without gradients.
        heldout_nats: the same on the held-out tokens' H; that of the calibration tokens where none were held out.
        error: relative error ``‖E‖_H / ‖W‖_H``, calibration tokens.
        heldout_error: the same on the held-out tokens, or those of the calibration.
    """

    choice: Choice
    bits: int
    nats: float
    heldout_nats: float
    error: float
    heldout_error: float


@dataclass(frozen=True)
class ErrorCurve:
    """The options of one layer with one base and one factor format, by rank.

    Attributes:
        base: name in the portfolio.
        factors: name in the portfolio.
        options: by rising rank.
    """

    base: str
    factors: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class LayerCurves:
    """All error curves of one layer.

    Attributes:
        shape: (out_features, in_features).
        curves: one for each base and factor format that fits.
        notes: which bases were left out, and why.
    """

    shape: tuple[int, int]
    curves: tuple[ErrorCurve, ...]
    notes: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[Option, ...]:
        """The options of all curves."""
        return tuple(option for curve in self.curves for option in curve.options)


def measure_curves(
    weight: Tensor, stats: LayerStats, portfolio: Portfolio, *, dtype: torch.dtype | None = None
) -> LayerCurves:
    """Every option of the portfolio for one layer.

    Args:
        weight: (out_features, in_features), any float dtype.
        stats: its calibration statistics.
        portfolio: what is tried. A base that does not fit the shape is left out with a note. A low-rank term that
            stores as much as the smallest base without one (int8, or dense) is not tried.
        dtype: of plain factors and dense layers; ``None`` is that of the weight.

    Raises:
        ShapeError, NonFiniteError, StatsError: for a bad weight or statistics of another layer.

    Cost: one fit a base, one eigenproblem of the smaller side and about ``6 m n (m + n)`` flops of errors a
    compensated base, in float64.
    """
    check_matrix(weight, "weight")
    stats.check_weight(weight)
    rulers: dict[tuple[Transform, ...], _Ruler] = {}
    curves, notes, limit = [], [], weight.numel() * (dtype or weight.dtype).itemsize * 8
    for name in sorted(portfolio.bases, key=lambda base: portfolio.bases[base].compensated):
        transforms = portfolio.bases[name].transforms
        if transforms not in rulers:
            rulers[transforms] = _Ruler(weight, apply_transforms(weight, transforms, stats))
        ruler = rulers[transforms]
        try:
            base = _base(ruler, portfolio, name, dtype)
        except FormatError as error:
            notes.append(f"{name} left out: {error}")
            continue
        if not portfolio.bases[name].compensated:
            curves.append(ErrorCurve(name, PLAIN, (_option(ruler, Choice(name), base),)))
            limit = min(limit, curves[-1].options[0].bits)
            continue
        bases = _Compensated(ruler, portfolio, name, base, dtype or weight.dtype, limit)
        found = {PLAIN: bases.plain()} | {f: bases.rounded(f) for f in portfolio.factors if f != PLAIN}
        curves += [ErrorCurve(name, factors, options) for factors, options in found.items() if options]
    return LayerCurves((weight.shape[0], weight.shape[1]), tuple(curves), tuple(notes))


def _base(ruler: _Ruler, portfolio: Portfolio, name: str, dtype: torch.dtype | None) -> Expression:
    """The base as stored; a term of rank 0 where there is none."""
    (stage,) = portfolio.stages(Choice(name), dtype)
    return stage.fit(Target(ruler.weight, ruler.source, ruler.stats, 0)).term


def _option(ruler: _Ruler, choice: Choice, operator: Expression) -> Option:
    return Option(choice, ruler.wrap(operator).storage_bits, *ruler.errors(ruler.weight - dense64(operator)))


@dataclass(frozen=True, eq=False)
class _Compensated:
    """A base with low-rank terms on its residual, all below ``limit`` bits."""

    ruler: _Ruler
    portfolio: Portfolio
    name: str
    base: Expression
    dtype: torch.dtype
    limit: int

    @cached_property
    def residual(self) -> Tensor:
        return self.ruler.weight - dense64(self.base)

    @cached_property
    def empty(self) -> bool:
        return self.portfolio.bases[self.name].stage is None

    def plain(self) -> tuple[Option, ...]:
        """The base alone and with every useful rank of factors in the model's dtype."""
        per_rank = sum(self.residual.shape) * self.dtype.itemsize * 8
        useful = max(-(-(self.limit - self.ruler.wrap(self.base).storage_bits) // per_rank) - 1, 0)
        largest = min(useful, self.portfolio.max_rank, *self.residual.shape)
        ranks = list(range(0, largest + 1, self.portfolio.rank_step))
        term = self._term(ranks[-1], self.dtype)
        errors = self.ruler.prefix_errors(self.residual, term)
        first = 1 if self.empty else 0  # storing nothing is no option
        return tuple(
            Option(Choice(self.name, k), self._with(_prefix(term, k)).storage_bits, *(float(e[k]) for e in errors))
            for k in ranks[first:]
        )

    def rounded(self, factors: str) -> tuple[Option, ...]:
        """The ranks of the portfolio with factors in a number format, each rounded and measured."""
        format = self.portfolio.factors[factors]
        assert format is not None, "only the model's dtype has no format"
        formats, shape = FactorFormats.of(format), (self.residual.shape[0], self.residual.shape[1])
        spent = self.ruler.wrap(self.base).storage_bits
        ranks = [k for k in self.portfolio.factor_ranks if k <= min(*shape, self.portfolio.max_rank)]
        ranks = [k for k in ranks if formats.fits(k) and spent + formats.stored_bits(shape, k) < self.limit]
        term = self._term(max(ranks, default=0), torch.float64)
        found = []
        for k in ranks:
            quantized = quantize_factors(
                self.residual, _prefix(term, k), self.ruler.metric, formats, method="gptq"
            ).term
            errors = self.ruler.errors(self.residual - dense64(quantized))
            found.append(Option(Choice(self.name, k, factors), self._with(quantized).storage_bits, *errors))
        return tuple(found)

    def _term(self, rank: int, dtype: torch.dtype) -> LowRank:
        return fit_low_rank(
            self.residual, self.ruler.source, rank, self.ruler.metric, solver=None, dtype=dtype, spent_bits=0
        ).term  # fmt: skip

    def _with(self, term: Expression) -> Expression:
        """The operator as it is written."""
        nothing = isinstance(term, LowRank) and term.rank == 0
        return self.ruler.wrap(term if self.empty else self.base if nothing else Sum((self.base, term)))


def _prefix(term: LowRank, rank: int) -> LowRank:
    return LowRank(term.left[:, :rank], term.right[:rank])


class _Ruler:
    """Measures residuals of one layer, in one basis: nats and relative errors on both sets of tokens."""

    def __init__(self, source: Tensor, inner: Transformed) -> None:
        assert inner.stats is not None, "curves are measured with statistics"
        stats = inner.stats
        self.stats, self.wrap, self.weight = stats, inner.wrap, inner.weight
        self.source = inner.weight.to(source.dtype)
        self.metric = Metric.auto(stats)
        self._gradient = None if stats.gradient is None else stats.gradient.second.double()
        inputs = [stats.inputs] if stats.heldout is None else [stats.inputs, stats.heldout]
        self._hessians = [each.second.double() for each in inputs]
        self._scales = [Metric(h).norm(self.weight) for h in self._hessians]

    def errors(self, residual: Tensor) -> tuple[float, float, float, float]:
        """nats, held-out nats, error, held-out error of a residual (m, n) float64."""
        nothing = LowRank(residual.new_zeros(residual.shape[0], 0), residual.new_zeros(0, residual.shape[1]))
        nats, heldout_nats, error, heldout_error = (float(e[0]) for e in self.prefix_errors(residual, nothing))
        return nats, heldout_nats, error, heldout_error

    def prefix_errors(self, residual: Tensor, term: LowRank) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, each (rank + 1,), with the first 0, 1, … components of a term taken off.

        ``‖D − Σ lᵢ rᵢ‖² = ‖D‖² − 2 Σᵢ lᵢᵀ G D H rᵢ + Σᵢⱼ (lᵢᵀ G lⱼ)(rᵢᵀ H rⱼ)``: sums over leading squares.
        """
        left, right = term.left.double(), term.right.double()
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        products = [(residual @ hessian, right @ hessian) for hessian in self._hessians]  # D H (m, n), R H (k, n)
        for priced, gradient in self._sides():
            weighted = left if gradient is None else gradient @ left
            price = residual if gradient is None else gradient @ residual
            seen_by_left, square = weighted.T @ residual, left.T @ weighted
            for seen, rows in products:
                taken = (square * (rows @ right.T)).cumsum(0).cumsum(1).diagonal()
                taken = taken - 2 * (seen_by_left * rows).sum(1).cumsum(0)
                found[priced].append(((seen * price).sum() + torch.cat([taken.new_zeros(1), taken])).clamp_min(0))
        errors = [_relative(e, scale) for e, scale in zip(found[False], self._scales, strict=True)]
        nats = [0.5 * e for e in found[True]] or [torch.full_like(errors[0], torch.nan)]
        return nats[0], nats[-1], errors[0], errors[-1]

    def _sides(self) -> list[tuple[bool, Tensor | None]]:
        """(whether the unit is nats, G)."""
        return [(False, None)] if self._gradient is None else [(True, self._gradient), (False, None)]


def _relative(squared: Tensor, scale: float) -> Tensor:
    """Relative, not squared; 0 where both vanish."""
    if scale > 0:
        return squared.sqrt() / scale
    return torch.where(squared > 0, torch.inf, 0.0)
