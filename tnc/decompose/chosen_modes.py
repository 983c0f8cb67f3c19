"""`ChosenModesStage`: a two-core operator over the modes that suit the layer, the truncated SVD among them.

With output modes ``(m, 1)`` and input modes ``(1, n)`` the two cores are the factors of a truncated SVD, so matrix
product operators hold the low-rank matrices. Between these modes and the balanced ones, ``(m / a, a)`` beside
``(b, n / b)`` in either order, lie matrices that are of low rank once a few columns stand beside the rows or a few rows
beside the columns, as in the values of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tnc.decompose.low_rank import truncated_svd
from tnc.decompose.mpo_stage import ALS_LIMIT, MpoStage
from tnc.decompose.sizes import BitsPerWeight, Size
from tnc.decompose.stages import Fitted, MetricOf, Target
from tnc.errors import BudgetError, RecipeError
from tnc.metric import Metric
from tnc.networks import als, site_modes
from tnc.networks.modes import Modes
from tnc.terms import Mpo, dense64


@dataclass(frozen=True)
class ChosenModesStage:
    """The two-core operator of least error among several modes at the same bits.

    Every candidate is fitted as `MpoStage` does with one sweep, and the best one is refined; it is never above the
    truncated SVD of these bits. Modes that have no bond dimension within the bits are left out.

    Attributes:
        rank: the bits, as `BitsPerWeight`: bonds over different modes do not compare.
        splits: the ``a`` and ``b`` above that divide the layer; one of them is 1 in every candidate.
        metric: as in `MpoStage`.
        sweeps: of alternating least squares in all; 0 leaves the truncated SVD and the starts.
        dtype: of the stored cores; ``None`` is the dtype of the weight.

    Raises:
        RecipeError: for another kind of size.

    Cost: that of `MpoStage` with one sweep, four times for each split that divides both sides.
    """

    rank: Size
    splits: tuple[int, ...] = (4,)
    metric: MetricOf = Metric.auto
    sweeps: int = 2
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, BitsPerWeight) or self.sweeps < 0 or any(split < 2 for split in self.splits):
            raise RecipeError(
                f"ChosenModesStage(rank={self.rank!r}, splits={self.splits}, sweeps={self.sweeps}); expected "
                "BitsPerWeight(b), splits of at least 2 and no negative number of sweeps."
            )

    def fit(self, target: Target) -> Fitted:
        """The best operator fitted to the residual; ``choices`` says over which modes, and of how many."""
        shape = (target.residual.shape[0], target.residual.shape[1])
        metric = Metric() if target.stats is None else self.metric(target.stats)
        found: list[tuple[float, str, Mpo, Fitted]] = []
        for outs, ins in self.candidates(shape):
            try:
                each = self._fitted(target, metric, outs, ins)
            except BudgetError:
                continue
            assert isinstance(each.term, Mpo)
            found.append((metric.norm(target.residual - dense64(each.term)), f"{outs} x {ins}", each.term, each))
        if not found:
            self._stage(*site_modes(shape, 2)).fit(target)  # says what would fit
        _, modes, mpo, best = min(found, key=lambda row: row[0])
        if self.sweeps > 1 and found[0][2] is not mpo and target.residual.numel() <= ALS_LIMIT:
            mpo = als(target.residual, mpo, metric=metric, sweeps=self.sweeps - 1).mpo
        return Fitted(mpo, fallbacks=best.fallbacks, choices=(f"modes {modes}, the best of {len(found)}",))

    def _fitted(self, target: Target, metric: Metric, outs: Modes, ins: Modes) -> Fitted:
        """A candidate; over the modes of the truncated SVD that, which needs no root and no inverse of the metric."""
        stage = self._stage(outs, ins)
        if not outs[1] == ins[0] == 1:
            return stage.fit(target)
        shape, dtype = (outs[0], ins[1]), self.dtype or target.weight.dtype
        rank = stage.bond(shape, dtype, spent=target.spent_bits)
        found = truncated_svd(target.residual, rank, metric=metric, dtype=dtype)
        cores = found.left.reshape(1, shape[0], 1, -1), found.right.reshape(-1, 1, shape[1], 1)
        return Fitted(Mpo(cores, shape))

    def candidates(self, shape: tuple[int, int]) -> Iterator[tuple[Modes, Modes]]:
        """Output and input modes: those of the truncated SVD first, then skewed ones, then balanced ones."""
        rows, columns = shape
        yield (rows, 1), (1, columns)
        for split in self.splits:
            if columns % split == 0:
                yield (rows, 1), (split, columns // split)
                yield (1, rows), (columns // split, split)
            if rows % split == 0:
                yield (rows // split, split), (1, columns)
                yield (split, rows // split), (columns, 1)
        yield site_modes(shape, 2)

    def _stage(self, outs: Modes, ins: Modes) -> MpoStage:
        return MpoStage(
            self.rank, metric=self.metric, sweeps=min(self.sweeps, 1), out_modes=outs, in_modes=ins, dtype=self.dtype
        )  # fmt: skip
