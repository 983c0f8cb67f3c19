"""`SelectedStage`: a correction with one factor, which acts on a few inputs only.

With S the rows of the identity that select k inputs, the best ``C S`` for a residual D is
``C = D H Sᵀ (S H Sᵀ)⁻¹``, for every G (G cancels, as for any free left factor), and takes
``tr(G C (S H Sᵀ) Cᵀ)`` out of the squared error. Only C and k indices are stored: there is no second
factor to store, round or run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.decompose.sizes import BitsPerWeight, RelativeError, Size, fixed_rank, rank_within_bits
from tnc.decompose.stages import Fitted, Target
from tnc.errors import BudgetError
from tnc.formats import NumberFormat
from tnc.metric import Metric
from tnc.quant import quantizer
from tnc.stats import LayerStats
from tnc.terms import Dense, Expression, Product, Selection

_LEAST = 1e-9  # share of H_jj that other selected inputs may leave of an input before it is one of their sums


@dataclass(frozen=True)
class SelectedStage:
    """``Product((columns, selection))``: columns of the weight corrected for the inputs that matter most.

    Inputs are chosen one by one, each the one that lowers the error in ``G ⊗ H`` (H without gradients) most beside
    those chosen before.

    Attributes:
        rank: how many inputs: an int, `Rank` or `BitsPerWeight` (counts the other terms).
        format: number format of the columns, one group a row; rounded by GPTQ in ``S H Sᵀ``. ``None`` stores them in
            the dtype of the weight.

    Raises:
        BudgetError: on use with a `RelativeError`.

    Cost: a product ``D H``, then ``2 n (m + n)`` flops an input.
    Source: SERQ (arXiv:2603.08185): one factor for salient channels. There they are those of largest activation and
    weight, and their residual is copied; here they are chosen by the error and its least-squares correction is taken.
    """

    rank: Size
    format: NumberFormat | None = None

    def fit(self, target: Target) -> Fitted:
        """The best correction of the residual for the inputs chosen."""
        shape = (target.weight.shape[0], target.weight.shape[1])
        metric = Metric() if target.stats is None else Metric.auto(target.stats)
        residual = target.residual.double()
        identity = torch.eye(shape[1], dtype=torch.float64, device=residual.device)
        hessian = identity if metric.hessian is None else metric.hessian.double()
        chosen = chosen_inputs(residual, self._count(target, shape), Metric(hessian, metric.gradient))
        pull, within = residual @ hessian[:, chosen], hessian[chosen][:, chosen]
        columns = pull @ torch.linalg.pinv(within, hermitian=True) if len(chosen) else pull
        stored, damping, notes = self._stored(columns, within, metric, target)
        return Fitted(Product((stored, Selection.of(chosen, shape[1]))), damping, notes)

    def _count(self, target: Target, shape: tuple[int, int]) -> int:
        if isinstance(self.rank, RelativeError):
            raise BudgetError(f"SelectedStage takes a number of inputs or BitsPerWeight; got {self.rank}.")
        if not isinstance(self.rank, BitsPerWeight):
            return fixed_rank(self.rank, shape, "SelectedStage")
        index = Selection.of(torch.zeros(1, dtype=torch.int64), shape[1]).storage_bits
        plain = shape[0] * target.weight.dtype.itemsize * 8
        rows = self._rows

        def spent(k: int) -> int:
            return k * index + (k * plain if rows is None or k == 0 else rows.stored_bits((shape[0], k)))

        return rank_within_bits(self.rank, shape, target.spent_bits, spent)

    @property
    def _rows(self) -> NumberFormat | None:
        """The format with one group a row."""
        return None if self.format is None else replace(self.format, group_size=None)  # type: ignore[type-var]

    def _stored(
        self, columns: Tensor, within: Tensor, metric: Metric, target: Target
    ) -> tuple[Expression, float | None, tuple[str, ...]]:
        if self._rows is None or columns.shape[1] == 0:
            return Dense(columns.to(target.weight.dtype)), None, ()
        tokens = 1 if target.stats is None else target.stats.tokens
        found = quantizer("gptq").run(columns, LayerStats.from_hessian(within, tokens=tokens), self._rows)
        return found.term, found.damping, found.fallbacks


def chosen_inputs(residual: Tensor, count: int, metric: Metric) -> Tensor:
    """(count,) inputs, rising, whose correction takes the most out of ``‖residual‖²``, chosen one by one.

    Input j takes ``(D H̃)_jᵀ G (D H̃)_j / H̃_jj``, H̃ the moment of the inputs without what those chosen before explain:
    a Cholesky factorization of H with this pivot. Inputs that others explain wholly come last.

    Args:
        residual: D (m, n) float64.
        count: at most n.
        metric: with a full H, float64.
    """
    assert metric.hessian is not None
    left = metric.hessian.clone()  # H̃
    pull = residual @ left
    first = left.diagonal().clone()
    free = torch.ones_like(first, dtype=torch.bool)
    chosen = []
    for _ in range(count):
        pivot = left.diagonal()
        gain = (pull * metric.times_gradient(pull)).sum(0) / pivot.masked_fill(pivot <= _LEAST * first, torch.inf)
        j = int(gain.masked_fill(~free, -1).argmax())
        chosen.append(j)
        free[j] = False
        if pivot[j] > _LEAST * first[j]:
            column = left[:, j] / pivot[j]
            pull = pull - torch.outer(pull[:, j], column)
            left = left - torch.outer(column, left[j])
    return torch.tensor(sorted(chosen), dtype=torch.int64, device=residual.device)
