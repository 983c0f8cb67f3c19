"""`MpoStage`: a matrix product operator as a term of a sum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tnc.decompose.cores import CoreFormats, core_bits, quantize_cores
from tnc.decompose.sizes import BitsPerWeight, Rank, RelativeError, Size
from tnc.decompose.stages import Fitted, MetricOf, Target
from tnc.errors import BudgetError, RecipeError
from tnc.metric import Metric
from tnc.networks import KroneckerMetric, adapt_ranks, als, site_modes, tt_svd_with_report
from tnc.networks.modes import Modes, check_pair, rank_bounds, site_tensor
from tnc.quant import quantizer
from tnc.stats import LayerStats
from tnc.terms import Mpo, dense64

# A step of conjugate gradients takes 2 m n (m + n) flops, hundreds of them a sweep: an hour or so above this size.
ALS_LIMIT = 2**23


@dataclass(frozen=True)
class MpoStage:
    """Matrix product operator by TT-SVD, plain and Kronecker-whitened, the better one refined by ALS in the metric.

    Attributes:
        rank: largest bond dimension, an int or `Rank` (0 is the zero matrix); `BitsPerWeight` (the largest one that
            fits beside the other terms); or `RelativeError` in the metric, met by two-site rank adaptation.
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

    rank: Size
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
            rank = self.bond(shape, dtype, spent=target.spent_bits)
            by_rank = partial(self._by_rank, target.residual, metric)
            mpo, more = by_rank(outs, ins, rank, dtype) if rank else (_zero(shape, outs, ins, dtype), [])
            notes += more
            if rank and self.core_format is not None:
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

    def spectrum(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Singular values of the two-core unfolding in the Kronecker-factored metric: the curve for pooling.

        Raises:
            RecipeError: for another number of cores, whose error is no function of one bond.
        """
        outs, ins = self.modes((weight.shape[0], weight.shape[1]))
        if len(outs) != 2:
            raise RecipeError(f"MpoStage(cores={len(outs)}): bonds are pooled over a model for two cores only.")
        metric = self.metric(stats)
        white = KroneckerMetric.nearest(metric, (weight.shape[0], weight.shape[1]), outs, ins)
        values: Tensor = torch.linalg.svdvals(white.whitened(site_tensor(weight, outs, ins, torch.float64)))
        return values

    def rank_entries(self, shape: tuple[int, int]) -> int:
        """Numbers stored for each unit of the bond dimension of two cores."""
        return sum(o * i for o, i in zip(*self.modes(shape), strict=True))

    def bond(self, shape: tuple[int, int], dtype: torch.dtype, *, spent: int = 0) -> int:
        """The bond dimension asked for, or the largest that fits the bits beside ``spent`` ones.

        Raises:
            BudgetError: if not even 1 fits.
        """
        outs, ins = self.modes(shape)
        if not isinstance(self.rank, BitsPerWeight):
            assert not isinstance(self.rank, RelativeError)
            return self.rank.value if isinstance(self.rank, Rank) else self.rank
        low, high, size = 0, max(rank_bounds(outs, ins), default=1), shape[0] * shape[1]
        while low < high:
            middle = (low + high + 1) // 2
            stored = spent + self.stored_bits(shape, middle, dtype)
            low, high = (middle, high) if stored / size <= self.rank.value else (low, middle - 1)
        if low == 0:
            smallest = (spent + self.stored_bits(shape, 1, dtype)) / size
            raise BudgetError(
                f"BitsPerWeight({self.rank.value}) has no room for a bond dimension of 1 over modes {outs} x {ins} of "
                f"weight {shape} beside {spent} bits; ask for at least {smallest:.4f} bits, or more cores."
            )
        return low

    def stored_bits(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:
        """Bits of the cores when no bond is above ``rank``."""
        outs, ins = self.modes(shape)
        ranks = (1, *(min(rank, bound) for bound in rank_bounds(outs, ins)), 1)
        return core_bits(self.core_format, outs, ins, ranks, self.dtype or dtype)

    def _by_rank(
        self, residual: Tensor, metric: Metric, outs: Modes, ins: Modes, rank: int, dtype: torch.dtype
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


def _zero(shape: tuple[int, int], outs: Modes, ins: Modes, dtype: torch.dtype) -> Mpo:
    """The operator of bond dimension 0, which stores nothing (a lone core stores its zeros)."""
    ranks = [1, *(0 for _ in outs[1:]), 1]
    sizes = zip(ranks, outs, ins, ranks[1:], strict=False)
    return Mpo(tuple(torch.zeros(size, dtype=dtype) for size in sizes), shape)
