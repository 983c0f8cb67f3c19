"""`FormStage`: sizes that count the other terms, errors that are relative to the weight."""

from functools import partial

import pytest
import torch
from strategies_matrices import well_conditioned

from tnc.decompose import BitsPerWeight, QuantizeStage, RelativeError, decompose
from tnc.decompose.forms import FormStage, blast, monarch
from tnc.errors import BudgetError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.terms import Blast, Quantized

FORM = partial(blast, blocks=(2, 2), sweeps=2)
BASE = QuantizeStage(IntFormat(3), method="rtn")


def test_bits_count_the_base():
    problem = well_conditioned(16, 24, 0)
    found = decompose(problem.weight.float(), (BASE, FormStage(FORM, BitsPerWeight(9), dtype=torch.float16)),
                      problem.stats())  # fmt: skip
    base, term = found.operator.terms
    assert isinstance(base, Quantized) and isinstance(term, Blast) and term.left.dtype == torch.float16
    assert found.report.bits_per_weight <= 9 < found.report.bits_per_weight + 16 * (40 + 4) / 384
    with pytest.raises(BudgetError, match=r"BitsPerWeight\(3\) is spent: the other terms store"):
        decompose(problem.weight, (BASE, FormStage(FORM, BitsPerWeight(3))), problem.stats())


def test_error_is_relative_to_the_weight():
    problem = well_conditioned(16, 24, 0, fisher=True)
    stages = (BASE, FormStage(FORM, RelativeError(0.05), metric=Metric.full))
    found = decompose(problem.weight, stages, problem.stats())
    assert found.report.relative_error <= 0.05
    loose = decompose(problem.weight, (BASE, FormStage(FORM, RelativeError(0.99))), problem.stats())
    assert loose.operator.terms[1].rank == 0


def test_a_metric_that_was_not_to_be_had_is_reported():
    weight = well_conditioned(16, 24, 0).weight
    found = decompose(weight, (FormStage(partial(monarch, blocks=(4, 4)), 2, metric=Metric.full),))
    assert found.report.fallbacks == ("no statistics: structured form in the Frobenius norm",)
    assert decompose(weight, (FormStage(partial(monarch, blocks=(4, 4)), 2),)).report.fallbacks == ()
