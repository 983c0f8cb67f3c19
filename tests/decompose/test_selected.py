"""`SelectedStage` and `Selection`: against brute force over inputs, and the closed form of their correction."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.decompose import BitsPerWeight, QuantizeStage, RelativeError, SelectedStage, decompose
from tnc.decompose.selected import chosen_inputs
from tnc.errors import BudgetError, ShapeError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Product, Quantized, Selection, Sum, dense64
from tnc.testing import make_problem


def problem(shape=(7, 9), seed=0, hessian="full"):
    return make_problem(shape, spectrum="power", hessian=hessian, gradient="full", seed=seed)


def corrected(weight, inputs, metric):
    """Least error with these inputs, by solving the normal equations of all entries at once."""
    hessian, inputs = metric.hessian, list(inputs)
    columns = (weight @ hessian)[:, inputs] @ torch.linalg.pinv(hessian[inputs][:, inputs])
    error = weight.clone()
    error[:, inputs] -= columns
    return metric.squared_norm(error)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(0, 7))
def test_it_is_the_best_correction_of_its_inputs(seed, count):
    given_ = problem(seed=seed)
    metric = Metric.fisher(given_.stats)
    weight = given_.weight.double()
    found = decompose(weight, [SelectedStage(count)], given_.stats).operator
    chosen = found.terms[1].indices.tolist()
    assert len(set(chosen)) == count
    error = weight - dense64(found)
    assert metric.squared_norm(error) == pytest.approx(corrected(weight, chosen, metric), rel=1e-6, abs=1e-9)
    scale = float(weight.norm() * metric.hessian.norm()) + 1
    assert float((error @ metric.hessian)[:, chosen].abs().sum()) <= 1e-7 * scale  # nothing left to say of these inputs
    if count == 1:
        least = min(corrected(weight, [j], metric) for j in range(9))
        assert metric.squared_norm(error) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_each_input_is_the_best_beside_those_before(seed):
    given_ = problem(seed=seed)
    metric, weight = Metric.fisher(given_.stats), given_.weight.double()
    taken = []
    for _ in range(4):
        taken.append(min(set(range(9)) - set(taken), key=lambda j: corrected(weight, [*taken, j], metric)))
        assert chosen_inputs(weight, len(taken), metric).tolist() == sorted(taken)


def test_two_inputs_are_near_the_best_pair_and_all_leave_nothing():
    given_ = problem(seed=3)
    metric, weight = Metric.fisher(given_.stats), given_.weight.double()
    pairs = sorted(corrected(weight, pair, metric) for pair in itertools.combinations(range(9), 2))
    found = chosen_inputs(weight, 2, metric).tolist()
    assert corrected(weight, found, metric) <= pairs[3]
    square = problem((9, 9), seed=4)
    full = decompose(square.weight.double(), [SelectedStage(9)], square.stats).report
    assert full.relative_error < 1e-6


@pytest.mark.parametrize("hessian", ["zero", "rank_deficient"])
def test_inputs_that_say_nothing_come_last(hessian):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4 if hessian == "rank_deficient" else 0, generator=generator, dtype=torch.float64)
    stats = LayerStats.from_hessian(x @ x.T, tokens=4)
    report = decompose(torch.randn(7, 9, generator=generator), [SelectedStage(5)], stats).report
    assert report.relative_error < 1e-5 or hessian == "zero"


def test_a_base_gets_columns_of_four_bits_within_the_bits():
    given_ = problem((32, 48), seed=1)
    base = QuantizeStage(IntFormat(2, 16))
    alone = decompose(given_.weight, [base], given_.stats).report
    found = decompose(given_.weight, [base, SelectedStage(BitsPerWeight(4.5), IntFormat(4))], given_.stats)
    term = found.operator.terms[1]
    assert isinstance(found.operator, Sum) and isinstance(term, Product) and isinstance(term.terms[0], Quantized)
    assert found.report.rank == term.terms[1].shape[0] > 2 and found.report.bits_per_weight <= 4.5
    assert found.report.predicted_nats < alone.predicted_nats
    assert found.report.lower_bound <= found.report.relative_error
    one_more = 4 * 32 + 20 * 32 + 8
    assert found.report.bits_per_weight + one_more / given_.weight.numel() > 4.5
    floats = decompose(given_.weight, [base, SelectedStage(BitsPerWeight(4.5))], given_.stats).report
    assert floats.rank < found.report.rank and floats.bits_per_weight <= 4.5


def test_messages():
    given_ = problem()
    with pytest.raises(
        BudgetError, match=r"SelectedStage takes a number of inputs or BitsPerWeight; got RelativeError"
    ):
        decompose(given_.weight, [SelectedStage(RelativeError(0.1))], given_.stats)
    with pytest.raises(ShapeError, match=r"Selection.of got indices .* for 3 features; .* from 0 to 2"):
        Selection.of(torch.tensor([0, 3]), 3)
    with pytest.raises(ShapeError, match=r"Selection got indices .* Build it with Selection.of"):
        Selection(torch.zeros(2), 3)


def test_a_selection_by_hand():
    term = Selection.of(torch.tensor([2, 0, 2]), 4)
    assert term.to_dense().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]] and term.storage_bits == 24
    assert term.linear(torch.tensor([[5.0, 6.0, 7.0, 8.0]])).tolist() == [[7.0, 5.0, 7.0]]
    assert Selection.of(torch.tensor([300]), 400).storage_bits == 16
