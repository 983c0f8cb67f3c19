"""`MpoStage`: a matrix product operator as a term of a sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import index

import torch
from torch import Tensor

from tnc.decompose.bond_curve import BondPoint, Bonds, bond_curve
from tnc.decompose.cores import CoreFormats, core_bits, quantize_cores
from tnc.decompose.sizes import BitsPerWeight, Rank, RelativeError, Size
from tnc.decompose.stages import Fitted, MetricOf, Target
from tnc.errors import BudgetError, RankError, RecipeError
from tnc.metric import Metric
from tnc.networks import adapt_ranks, als, site_modes, tt_svd_with_report
from tnc.networks.modes import Modes, check_pair, rank_bounds
from tnc.quant import quantizer
from tnc.stats import LayerStats
from tnc.terms import Mpo, dense64

# A step of conjugate gradients takes 2 m n (m + n) flops, hundreds of them a sweep: an hour or so above this size.
ALS_LIMIT = 2**23
_MEASURED = 5  # sizes at which a layer is fitted to know what its bonds buy


@dataclass(frozen=True)
class MpoStage:
    """Matrix product operator by TT-SVD, plain and Kronecker-whitened, the better one refined by ALS in the metric.

    Attributes:
        rank: largest bond dimension, an int or `Rank` (0 is the zero matrix), or a limit for each of the inner bonds;
            `BitsPerWeight` (the largest one that fits beside the other terms); or `RelativeError` in the metric, met by
            two-site rank adaptation.
        cores: number of cores, with balanced modes, where no modes are given.
        metric: the metric made of the statistics; without statistics it is the Frobenius norm, which is reported
            as a fallback unless that is what `Metric.auto` or `Metric.identity` mean.
        sweeps: of alternating least squares; 0 keeps the start.
        out_modes: output modes; ``None`` balances them.
        in_modes: input modes.
        dtype: of the stored cores; ``None`` is the dtype of the weight.
        core_format: number format of the stored cores, or one for each (``None`` stores floats); the term is then a
            `Chain` of quantized cores, fitted as `tnc.decompose.cores` says. Without ``sweeps`` they are rounded once.
        core_method: a name of `tnc.quant.QUANTIZERS` for the cores.

    Raises:
        RecipeError: for impossible values, an unknown method, or a `RelativeError` with a core format: bonds are found
            for it before the cores are rounded.
    """

    rank: Size | Bonds
    cores: int = 2
    metric: MetricOf = Metric.auto
    sweeps: int = 2
    out_modes: Modes | None = None
    in_modes: Modes | None = None
    dtype: torch.dtype | None = None
    core_format: CoreFormats | None = None
    core_method: str = "yaqa"

    def __post_init__(self) -> None:
        quantizer(self.core_method)
        if self.core_format is not None and isinstance(self.rank, RelativeError):
            raise RecipeError(
                f"MpoStage({self.rank}, core_format=...): cores are rounded after the bonds are found, so the error is "
                "not met; give a rank or BitsPerWeight."
            )
        if self.cores < 1 or self.sweeps < 0 or (self.out_modes is None) != (self.in_modes is None):
            raise RecipeError(
                f"MpoStage(cores={self.cores}, sweeps={self.sweeps}, out_modes={self.out_modes}, in_modes="
                f"{self.in_modes}); expected cores >= 1, sweeps >= 0, and both mode lists or neither."
            )

    def fit(self, target: Target) -> Fitted:
        """The operator fitted to the residual."""
        shape = (target.residual.shape[0], target.residual.shape[1])
        outs, ins = self.modes(shape)
        metric = Metric() if target.stats is None else self.metric(target.stats)
        dtype = self.dtype or target.weight.dtype
        replaced = target.stats is None and self.metric not in (Metric.auto, Metric.identity)
        notes = ["no statistics: matrix product operator in the Frobenius norm"] if replaced else []
        if isinstance(self.rank, RelativeError):
            mpo = self._within(target, metric, outs, ins, self.rank, dtype)
        else:
            given = self.rank
            rank = given if isinstance(given, tuple) else self.bond(shape, dtype, spent=target.spent_bits)
            by_rank = partial(self._by_rank, target.residual, metric)
            anything = any(rank) if isinstance(rank, tuple) else rank
            mpo, more = by_rank(outs, ins, rank, dtype) if anything else (_zero(target.residual, outs, ins, dtype), [])
            notes += more
            if anything and self.core_format is not None:
                return self._quantized(target.residual, mpo, metric, self.core_format, notes)
        return Fitted(mpo, fallbacks=tuple(notes))

    def _quantized(self, residual: Tensor, mpo: Mpo, metric: Metric, formats: CoreFormats, notes: list[str]) -> Fitted:
        rounds = self.sweeps if residual.numel() <= ALS_LIMIT else 0
        found = quantize_cores(residual, mpo, metric, formats, method=self.core_method, rounds=rounds)
        return Fitted(found.chain, found.damping, (*notes, *found.fallbacks))

    def modes(self, shape: tuple[int, int]) -> tuple[Modes, Modes]:
        """Output and input modes for a weight of this shape.

        Raises:
            ShapeError: if given modes do not cover it.
        """
        if self.out_modes is None or self.in_modes is None:
            return site_modes(shape, self.cores)
        return check_pair(shape, self.out_modes, self.in_modes)

    def curve(self, weight: Tensor, stats: LayerStats, dtype: torch.dtype) -> tuple[BondPoint, ...]:
        """What every limit of all bonds buys, up to the bits of the dense layer: for pooling over a model.

        Fits with at most one sweep are measured at a few sizes, their cores in floats: what rounding them costs is
        not in the nats.

        Cost: five fits.
        """
        shape = (weight.shape[0], weight.shape[1])
        outs, ins = self.modes(shape)
        bounds, metric = rank_bounds(outs, ins), self.metric(stats)
        limits = [tuple(min(rank, bound) for bound in bounds) for rank in range(1, max(bounds, default=0) + 1)]
        sized = [(bonds, self.stored_bits(shape, dtype, bonds)) for bonds in limits]
        below = [each for each in sized if each[1] < weight.numel() * dtype.itemsize * 8]
        probe = replace(self, sweeps=min(self.sweeps, 1), core_format=None, dtype=self.dtype or dtype)
        residual = weight.double()

        def measure(bonds: Bonds) -> float:
            found = replace(probe, rank=bonds).fit(Target(residual, weight, stats, 0))
            return metric.nats(residual - dense64(found.term))

        nothing = BondPoint((0,) * len(bounds), 0, metric.nats(residual))
        return bond_curve(below, nothing, measure, _MEASURED) if bounds else ()

    def bond(self, shape: tuple[int, int], dtype: torch.dtype, *, spent: int = 0) -> int:
        """The bond dimension asked for, or the largest that fits the bits beside ``spent`` ones.

        Raises:
            BudgetError: if not even 1 fits.
            RankError: if what was asked for is neither bits nor an integer.
        """
        outs, ins = self.modes(shape)
        if not isinstance(self.rank, BitsPerWeight):
            return _as_int(self.rank.value if isinstance(self.rank, Rank) else self.rank)
        low, high, size = 0, max(rank_bounds(outs, ins), default=1), shape[0] * shape[1]
        while low < high:
            middle = (low + high + 1) // 2
            stored = spent + self.stored_bits(shape, dtype, middle)
            low, high = (middle, high) if stored / size <= self.rank.value else (low, middle - 1)
        if low == 0:
            smallest = (spent + self.stored_bits(shape, dtype, 1)) / size
            raise BudgetError(
                f"BitsPerWeight({self.rank.value}) has no room for a bond dimension of 1 over modes {outs} x {ins} of "
                f"weight {shape} beside {spent} bits; ask for at least {smallest:.4f} bits, or more cores."
            )
        return low

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype, rank: int | Bonds) -> int:
        """Bits of the cores when no bond is above ``rank``, or each is at most its own limit."""
        outs, ins = self.modes(shape)
        bounds = rank_bounds(outs, ins)
        limits = (rank,) * len(bounds) if isinstance(rank, int) else rank
        ranks = (1, *map(min, limits, bounds), 1)
        return core_bits(self.core_format, outs, ins, ranks, self.dtype or dtype)

    def _by_rank(
        self, residual: Tensor, metric: Metric, outs: Modes, ins: Modes, rank: int | Bonds, dtype: torch.dtype
    ) -> tuple[Mpo, list[str]]:
        """The better of both starts, refined."""
        norms = (None,) if metric.hessian is None and metric.gradient is None else (None, metric)
        starts = [tt_svd_with_report(residual, outs, ins, max_rank=rank, metric=m, dtype=dtype) for m in norms]
        errors = [metric.norm(residual - dense64(fit.mpo)) for fit in starts]
        fit = starts[errors.index(min(errors))]
        notes = list(fit.notes)
        if not self.sweeps or (len(norms) == 1 and len(outs) <= 2):  # two cores are optimal in the Frobenius norm
            return fit.mpo, notes
        if residual.numel() > ALS_LIMIT:
            return fit.mpo, [*notes, f"no alternating least squares: more than {ALS_LIMIT} weights"]
        return als(residual, fit.mpo, metric=metric, sweeps=self.sweeps).mpo, notes

    def _within(
        self, target: Target, metric: Metric, outs: Modes, ins: Modes, size: RelativeError, dtype: torch.dtype
    ) -> Mpo:
        """Rank adaptation from the whole residual; the tolerance is relative to the weight."""
        scale = metric.norm(target.weight.double()) / max(metric.norm(target.residual), 1e-300)
        eps = min(size.value * scale, 1 - 1e-9)
        full = tt_svd_with_report(target.residual, outs, ins, dtype=dtype).mpo
        return adapt_ranks(target.residual, full, eps=eps, metric=metric, sweeps=max(self.sweeps, 1))


def _as_int(rank: Size | Bonds) -> int:
    """A Python int, whatever sort of integer was given."""
    try:
        return index(rank)  # type: ignore[arg-type]
    except TypeError:
        raise RankError(
            f"MpoStage(rank={rank!r}): expected an integer bond dimension of at least 0, or BitsPerWeight(b)."
        ) from None


def _zero(like: Tensor, outs: Modes, ins: Modes, dtype: torch.dtype) -> Mpo:
    """The operator of bond dimension 0 in the place of a matrix; it stores nothing (a lone core stores its zeros)."""
    ranks = [1, *(0 for _ in outs[1:]), 1]
    sizes = zip(ranks, outs, ins, ranks[1:], strict=False)
    return Mpo(tuple(like.new_zeros(size, dtype=dtype) for size in sizes), (like.shape[0], like.shape[1]))
