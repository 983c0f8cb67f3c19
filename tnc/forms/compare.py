"""`compare_forms`: one weight in every form at equal storage bits, and which one wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tnc.decompose import Decomposition, LayerReport, decompose
from tnc.decompose.stages import MetricOf
from tnc.decompose.structure import has_codes
from tnc.errors import BudgetError, FormatError, RankError
from tnc.forms.contenders import Contender, contenders
from tnc.forms.cost import REFERENCE_MACHINE, Cost, Machine, cost_of
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Dense


@dataclass(frozen=True)
class FormRow:
    """One form of the weight.

    Attributes:
        form: its name.
        report: errors, bits and lower bound as stored; ``None`` where the form cannot be had at these bits.
        costs: one for each number of tokens.
        reason: why there is no report.
        coded: whether a base, a factor or a core is quantized.
    """

    form: str
    report: LayerReport | None
    costs: tuple[Cost, ...] = ()
    reason: str | None = None
    coded: bool = False


@dataclass(frozen=True)
class Comparison:
    """Every form of one weight at equal bits.

    Attributes:
        shape: (out_features, in_features).
        bits: stored bits per weight that each form could spend.
        rows: truncated SVD first, then the other forms.
        dense: cost of the dense weight in the factor dtype, one for each number of tokens.
        measure: what `winner` goes by: ``predicted_nats``, else ``heldout_relative_error``, else
            ``relative_error``.
        machine: behind the predicted seconds.
    """

    shape: tuple[int, int]
    bits: float
    rows: tuple[FormRow, ...]
    dense: tuple[Cost, ...]
    measure: str
    machine: Machine

    @property
    def winner(self) -> FormRow:
        """The row with the smallest `measure`; the earlier one on a tie."""
        return min((row for row in self.rows if row.report is not None), key=self.loss)

    @property
    def structured_winner(self) -> FormRow:
        """The same among the rows without codes: forms of full-precision factors."""
        found = (row for row in self.rows if row.report is not None and not row.coded)
        return min(found, key=self.loss)

    def loss(self, row: FormRow) -> float:
        """The `measure` of a row."""
        assert row.report is not None
        return float(getattr(row.report, self.measure))

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields, the winner by name."""
        rows = [
            {"form": row.form, "report": row.report and row.report.to_json(), "reason": row.reason,
             "costs": [asdict(cost) for cost in row.costs]}
            for row in self.rows
        ]  # fmt: skip
        return {
            "shape": list(self.shape), "bits": self.bits, "rows": rows, "dense": [asdict(cost) for cost in self.dense],
            "measure": self.measure, "machine": asdict(self.machine), "winner": self.winner.form,
            "structured_winner": self.structured_winner.form,
        }  # fmt: skip


def compare_forms(
    weight: Tensor, stats: LayerStats | None = None, *, bits: float, metric: MetricOf = Metric.auto,
    tokens: Sequence[int] = (1, 16, 256), dtype: torch.dtype = torch.float16, machine: Machine = REFERENCE_MACHINE,
    forms: Sequence[Contender] | None = None, progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:  # fmt: skip
    """Decompose ``weight`` into every form at equal storage bits.

    Args:
        weight: (out_features, in_features), any float dtype.
        stats: calibration statistics; without them everything is in the Frobenius norm and bases are rounded to
            nearest.
        bits: stored bits per weight that each form may spend; everything stored is counted.
        metric: in which the forms are fitted.
        tokens: numbers of tokens for which the cost is predicted.
        dtype: of stored factors.
        machine: rates behind the predicted seconds; `measure_machine` measures yours.
        forms: contenders; ``None`` is `contenders`.
        progress: called with (form, done, total).

    Returns:
        A row a form. A form that does not exist at these bits or for this shape has a reason instead of a report.

    Raises:
        ShapeError, NonFiniteError, StatsError: if the weight or the statistics cannot be used.

    Cost: all decompositions one after another: 40 s for 512 x 512, minutes for 512 x 1408 on one core.
    """
    shape = (weight.shape[0], weight.shape[1])
    quantizer = "rtn" if stats is None else "gptq"
    chosen = contenders(shape, bits, metric=metric, dtype=dtype, quantizer=quantizer) if forms is None else forms
    rows = []
    for done, each in enumerate(chosen):
        if progress is not None:
            progress("forms", done, len(chosen))
        rows.append(_row(each, weight, stats, bits, tokens, machine))
    dense = tuple(cost_of(Dense(torch.empty(shape, dtype=dtype, device="meta")), t, machine) for t in tokens)
    return Comparison(shape, bits, tuple(rows), dense, _measure(stats), machine)


def _row(
    each: Contender, weight: Tensor, stats: LayerStats | None, bits: float, tokens: Sequence[int], machine: Machine
) -> FormRow:
    try:
        found: Decomposition = decompose(weight, each.stages, stats)
    except (BudgetError, FormatError, RankError) as error:
        return FormRow(each.name, None, reason=str(error))
    if found.report.bits_per_weight > bits:
        return FormRow(each.name, None, reason=f"stores {found.report.bits_per_weight:.3f} bits per weight")
    costs = tuple(cost_of(found.operator, t, machine) for t in tokens)
    return FormRow(each.name, found.report, costs, coded=has_codes(found.operator))


def _measure(stats: LayerStats | None) -> str:
    if stats is None:
        return "relative_error"
    if stats.gradient is not None:
        return "predicted_nats"
    return "relative_error" if stats.heldout is None else "heldout_relative_error"
