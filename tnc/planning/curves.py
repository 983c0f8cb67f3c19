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

from tnc.decompose.factor_formats import FactorFormats
from tnc.decompose.factors import FactorTarget, quantize_shared_factors
from tnc.decompose.low_rank import fit_low_rank
from tnc.planning.fits import FittedBase, LayerFits, fit_bases
from tnc.planning.portfolio import PLAIN, Choice, Portfolio
from tnc.planning.ruler import Remainder, Ruler
from tnc.stats import LayerStats
from tnc.terms import Expression, LowRank, Product, Sum, dense64


@dataclass(frozen=True, slots=True)  # of large models there are millions
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
        shared: whether the right factor is that of all layers that see one input.
    """

    base: str
    factors: str
    options: tuple[Option, ...]
    shared: bool = False


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
    """Every option of the portfolio for one layer by itself; `measure_groups` adds those of shared right factors.

    Args:
        weight: (out_features, in_features), any float dtype.
        stats: its calibration statistics.
        portfolio: what is tried. A base that does not fit the shape is left out with a note. A low-rank term that
            stores as much as the smallest near exact base (int8, or dense) is not tried.
        dtype: of plain factors and dense layers; ``None`` is that of the weight.

    Raises:
        ShapeError, NonFiniteError, StatsError: for a bad weight or statistics of another layer.

    Cost: one fit a base, one eigenproblem of the smaller side and about ``6 m n (m + n)`` flops of errors a
    compensated base, in float64.
    """
    return curves_of(fit_bases(weight, stats, portfolio, dtype=dtype))


def curves_of(fits: LayerFits) -> LayerCurves:
    """The curves of a layer whose bases are fitted."""
    portfolio, curves = fits.portfolio, []
    for name in sorted(fits.bases, key=lambda base: portfolio.bases[base].compensated):
        base = fits.bases[name]
        if not portfolio.bases[name].compensated:
            option = Option(Choice(name), base.ruler.wrap(base.term).storage_bits, *base.errors)
            curves.append(ErrorCurve(name, PLAIN, (option,)))
            continue
        bases = _Compensated(fits, name, base)
        found = {PLAIN: bases.plain()} | {f: bases.rounded(f) for f in portfolio.rounded}
        curves += [ErrorCurve(name, factors, options) for factors, options in found.items() if options]
    return LayerCurves((fits.weight.shape[0], fits.weight.shape[1]), tuple(curves), fits.notes)


@dataclass(frozen=True, eq=False)
class _Compensated:
    """A base with low-rank terms on its residual, all below ``limit`` bits."""

    fits: LayerFits
    name: str
    fitted: FittedBase

    @property
    def ruler(self) -> Ruler:
        return self.fitted.ruler

    @property
    def base(self) -> Expression:
        return self.fitted.term

    @property
    def portfolio(self) -> Portfolio:
        return self.fits.portfolio

    @cached_property
    def remainder(self) -> Remainder:
        return self.ruler.remainder(self.fitted.residual)

    @property
    def residual(self) -> Tensor:
        return self.remainder.residual

    @cached_property
    def empty(self) -> bool:
        return self.portfolio.bases[self.name].stage is None

    def plain(self) -> tuple[Option, ...]:
        """The base alone, and with every useful rank of factors in the model's dtype if the portfolio has those."""
        ranks = [0, *self._plain_ranks]
        term = _in_dtype(prefix_of(self._components, ranks[-1]), self.fits.dtype)
        errors = self.remainder.prefix_errors(term)
        first = 1 if self.empty else 0  # storing nothing is no option
        return tuple(
            Option(Choice(self.name, k), self._with(prefix_of(term, k)).storage_bits, *(float(e[k]) for e in errors))
            for k in ranks[first:]
        )

    def rounded(self, factors: str) -> tuple[Option, ...]:
        """The ranks of the portfolio with factors in a number format, each rounded and measured."""
        formats, found = self.portfolio.rounded[factors], []
        for k in self._rounded_ranks(formats):
            components = prefix_of(self._components, k)
            made = quantize_shared_factors(
                [self._target], [components.left], components.right, [self.ruler.metric], formats, method="gptq"
            )
            left, right = made.lefts[0], made.right
            errors = self.remainder.errors_without(LowRank(dense64(left), dense64(right)))
            found.append(
                Option(Choice(self.name, k, factors), self._with(Product((left, right))).storage_bits, *errors)
            )
        return tuple(found)

    @cached_property
    def _room(self) -> int:
        return self.fits.limit - self.ruler.wrap(self.base).storage_bits

    @property
    def _plain_ranks(self) -> range:
        per_rank = sum(self.residual.shape) * self.fits.dtype.itemsize * 8
        return self.portfolio.plain_ranks(min(-(-self._room // per_rank) - 1, *self.residual.shape))

    def _rounded_ranks(self, formats: FactorFormats) -> list[int]:
        shape = (self.residual.shape[0], self.residual.shape[1])
        return self.portfolio.ranks_within(formats, shape, min(shape), self._room)

    @cached_property
    def _target(self) -> FactorTarget:
        return FactorTarget(self.residual, self.ruler.metric)

    @cached_property
    def _components(self) -> LowRank:
        """What is stored, or rounded, the first components of."""
        rounded = (k for formats in self.portfolio.rounded.values() for k in self._rounded_ranks(formats))
        most = max([*self._plain_ranks, *rounded], default=0)
        return fit_low_rank(
            self.residual, self.ruler.source, most, self.ruler.metric, solver=None, dtype=torch.float64, spent_bits=0
        ).term  # fmt: skip

    def _with(self, term: Expression) -> Expression:
        """The operator as it is written."""
        nothing = isinstance(term, LowRank) and term.rank == 0
        return self.ruler.wrap(term if self.empty else self.base if nothing else Sum((self.base, term)))


def _in_dtype(term: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(term.left.to(dtype), term.right.to(dtype))


def prefix_of(term: LowRank, rank: int) -> LowRank:
    """The first components of a low-rank term."""
    return LowRank(term.left[:, :rank], term.right[:rank])
