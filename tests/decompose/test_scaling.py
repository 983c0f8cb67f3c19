"""AWQ's and SmoothQuant's scalings: exact, chosen by the error they claim, counted as stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnc
from tnc.decompose import AwqScaling, DenseStage, LowRankStage, QuantizeStage, Smoothing, decompose
from tnc.decompose.scaling import awq_error, awq_scale, scale_inputs
from tnc.errors import RecipeError, StatsError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.quant import rtn
from tnc.stats import LayerStats
from tnc.terms import Dense, Diagonal, Product, Quantized, dense64
from tnc.testing import make_problem, weighted_problems
from tnc.testing.oracle import error_in

FORMAT = IntFormat(3)


def outliers(shape=(32, 24)):
    """A flat weight whose inputs are 30 times as large in two places."""
    problem = make_problem(shape, dtype=torch.float32, heldout=True)
    size = torch.ones(shape[1], dtype=torch.float64)
    size[:2] = 30
    inputs = problem.stats.inputs
    H = size.unsqueeze(1) * inputs.second * size
    moments = type(inputs)(H, inputs.mean_abs * size, inputs.tokens)
    return problem.weight, LayerStats(moments, moments)


@settings(max_examples=40)
@given(
    problem=weighted_problems(metrics=("full", "mean_abs")),
    transform=st.sampled_from([Smoothing(), Smoothing(0.0), Smoothing(1.0), AwqScaling(IntFormat(2), grid=3)]),
)
def test_scaling_is_exact_and_keeps_norms(problem, transform):
    inner = transform.apply(problem.weight, problem.stats)
    weight = problem.weight.double()
    again = dense64(inner.wrap(Dense(inner.weight)))
    assert float((again - weight).norm()) <= 1e-12 * float(weight.norm())
    error = torch.randn(weight.shape, dtype=torch.float64)
    outer = error_in(Metric.full(problem.stats), dense64(inner.wrap(Dense(error))))
    slack = 1e-6 * float(problem.stats.hessian.norm()) ** 0.5 * float(error.norm()) * 100  # scales reach 100
    assert abs(error_in(Metric.full(inner.stats), error) - outer) <= 1e-6 * outer + slack


def test_statistics_are_of_the_scaled_inputs():
    weight, stats = outliers()
    inner = scale_inputs(weight, stats, awq_scale(stats, 0.5))
    d = inner.wrap(Dense(weight)).terms[-1].vector.double()
    torch.testing.assert_close(inner.stats.hessian, d.unsqueeze(1) * stats.hessian * d)
    torch.testing.assert_close(inner.stats.heldout.second, inner.stats.hessian)
    torch.testing.assert_close(inner.stats.inputs.mean_abs, d * stats.inputs.mean_abs)
    torch.testing.assert_close(inner.weight, weight.double() / d)
    assert d.dtype == torch.float64 and inner.storage_bits == 24 * 16


def test_awq_takes_the_best_alpha_of_its_grid():
    weight, stats = outliers()
    found = decompose(weight, [QuantizeStage(FORMAT, method="rtn", clip_ratios=(1.0,))], stats,
                      transforms=(AwqScaling(FORMAT, grid=10),))  # fmt: skip
    errors = {}
    for step in range(10):  # by hand: round W diag(s), undo, measure
        s = 1 / (1 / awq_scale(stats, step / 10)).half().double()
        term = rtn((weight.double() * s).float(), FORMAT, clip_ratios=(1.0,))
        errors[step / 10] = error_in(Metric.full(stats), weight.double() - dense64(term) / s)
    best = min(errors, key=errors.get)
    assert found.report.choices == (f"awq alpha = {best:g}",) and 0 < best < 1
    reference = error_in(Metric.full(stats), weight.double())
    assert found.report.relative_error == pytest.approx(errors[best] / reference, rel=1e-4)
    assert errors[best] < 0.8 * errors[0.0]
    assert awq_error(weight, stats, FORMAT, awq_scale(stats, best)) == pytest.approx(errors[best] ** 2, rel=1e-3)


def test_alpha_zero_stores_nothing():
    problem = make_problem((16, 8), hessian="identity")
    found = decompose(problem.weight, [QuantizeStage(FORMAT)], problem.stats, transforms=(AwqScaling(FORMAT),))
    assert found.report.choices == ("awq alpha = 0",) and isinstance(found.operator, Quantized)
    assert found.report.to_json()["choices"] == ["awq alpha = 0"]


def test_the_certificate_holds_for_scaled_grids():
    weight, stats = outliers()
    found = decompose(weight, [QuantizeStage(FORMAT)], stats, transforms=(AwqScaling(FORMAT),))
    assert isinstance(found.operator, Product) and isinstance(found.operator.terms[-1], Diagonal)
    assert 0 < found.report.lower_bound <= found.report.relative_error
    assert found.report.bits == 3


def test_statistics_of_a_hessian_alone_use_the_root_mean_square():
    weight, stats = outliers()
    rms = LayerStats.from_hessian(stats.hessian, tokens=stats.tokens)
    for transform in (Smoothing(), AwqScaling(FORMAT)):
        found = decompose(weight, [DenseStage()], rms, transforms=(transform,))
        assert found.report.fallbacks == ("scales from the root mean square: mean |x| is not known",)


@pytest.mark.parametrize("kind", ["zero", "dead_column"])
def test_dead_inputs_do_no_harm(kind):
    problem = make_problem((6, 8), hessian=kind)
    for transform in (Smoothing(), AwqScaling(FORMAT)):
        found = decompose(problem.weight, [QuantizeStage(FORMAT, method="rtn")], problem.stats, transforms=(transform,))
        assert torch.isfinite(dense64(found.operator)).all()
    zero = decompose(torch.zeros(6, 8), [QuantizeStage(FORMAT, method="rtn")], problem.stats, transforms=(Smoothing(),))
    assert not dense64(zero.operator).any()


def test_smoothing_by_hand():
    weight = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
    stats = make_problem((2, 2)).stats
    moments = type(stats.inputs)(torch.eye(2).double(), torch.tensor([1.0, 16.0], dtype=torch.float64), 5)
    inner = Smoothing(0.5).apply(weight, LayerStats(moments))
    assert inner.weight.abs().amax(0).tolist() == pytest.approx([2**-0.5, 4 * 2**0.5], rel=1e-3)  # 1 : 4 -> 1 : 8
    level = Smoothing(0.0).apply(weight, LayerStats(moments))
    assert level.weight.abs().amax(0).tolist() == pytest.approx([2, 2], rel=1e-3)


def test_low_rank_takes_up_the_outliers_that_smoothing_moves():
    weight, stats = outliers()
    plain, smooth = (
        decompose(weight, [LowRankStage(4, metric=Metric.identity)], stats, transforms=transforms).report.relative_error
        for transforms in ((), (Smoothing(1.0),))
    )
    assert smooth < 0.8 * plain


@pytest.mark.parametrize("make", [lambda: Smoothing(1.5), lambda: Smoothing(-0.1), lambda: AwqScaling(FORMAT, grid=0)])
def test_options_out_of_range_are_refused(make):
    with pytest.raises(RecipeError, match=r"is outside \[0, 1\]|must try at least one alpha"):
        make()


@pytest.mark.parametrize("transform", [Smoothing(), AwqScaling(FORMAT)])
def test_scales_need_statistics(transform):
    with pytest.raises(StatsError, match="needs calibration statistics for its scales"):
        transform.apply(torch.zeros(2, 2), None)


@pytest.mark.parametrize(
    "name", ["gptq_rotated", "quip", "yaqa_rotated", "yaqa_lr", "awq", "awq_gptq", "quip_lr", "svdquant_smooth"]
)
def test_recipes_beat_rounding_to_nearest(name):
    problem = make_problem((32, 64), spectrum="outlier_columns", dtype=torch.float32, gradient="full")
    rank = {"rank": 2} if "rank" in tnc.RECIPES[name].options else {}
    recipe = tnc.recipe(name, bits=3, group_size=32, **rank)
    found = decompose(problem.weight, recipe.stages, problem.stats, transforms=recipe.transforms)
    plain = decompose(problem.weight, tnc.recipe("rtn", bits=3, group_size=32).stages, problem.stats)
    assert found.report.predicted_nats < plain.report.predicted_nats
