"""`LearntScaling`: never worse than its starts, slopes against a closed form, what it stores."""

import pytest
import torch

from tnc.decompose import LearntScaling, QuantizeStage, decompose, recipe
from tnc.decompose.learnt_scaling import _Descent
from tnc.decompose.scaling import awq_scale, scale_inputs
from tnc.errors import FormatError, RecipeError, StatsError
from tnc.formats import IntFormat, TableFormat, number_format
from tnc.metric import Metric
from tnc.quant import rtn
from tnc.stats import LayerStats
from tnc.terms import Diagonal, Product, dense64
from tnc.testing import make_problem

FORMAT = IntFormat(3, 16)


def problem(seed=0, spectrum="outlier_columns"):
    return make_problem((32, 48), spectrum=spectrum, hessian="full", gradient="full", seed=seed)


def error_of(given, scale):
    inner = scale_inputs(given.weight, given.stats, scale)
    term = inner.wrap(rtn(inner.weight.float(), FORMAT, stats=inner.stats))
    return Metric.fisher(given.stats).squared_norm(given.weight.double() - dense64(term))


@pytest.mark.parametrize("spectrum", ["outlier_columns", "power", "flat"])
def test_it_beats_the_scales_it_starts_from(spectrum):
    given = problem(spectrum=spectrum)
    inner = LearntScaling(FORMAT, steps=40).apply(given.weight, given.stats)
    term = inner.wrap(rtn(inner.weight.float(), FORMAT, stats=inner.stats))
    found = Metric.fisher(given.stats).squared_norm(given.weight.double() - dense64(term))
    starts = [error_of(given, awq_scale(given.stats, alpha)) for alpha in (0.0, 0.25, 0.5, 0.75)]
    assert found <= min(starts) * (1 + 1e-4)
    assert found < 0.99 * min(starts)
    assert inner.choices[0].startswith("scaling learnt from alpha = ")
    start = LearntScaling(FORMAT, steps=0).apply(given.weight, given.stats)
    assert "learnt" not in start.choices[0]


@pytest.mark.parametrize("format", [FORMAT, IntFormat(4, None, True), TableFormat("nf4", 16)])
def test_slopes_of_ranges_are_those_of_learnt_steps(format):
    """LSQ: along a step's logarithm an entry moves by its rounding error inside the range, by itself beyond it."""
    given = problem()
    weight, metric = given.weight.float(), Metric.fisher(given.stats).to(torch.float32)
    descent = _Descent(weight, torch.ones(48), format, metric)
    with torch.no_grad():
        descent.log_ratio -= 0.3  # some entries beyond the range
        rounded = descent._rounded(weight)
        tiles = weight.reshape(32, -1, format.group_size or 48)
        ratio = descent.log_ratio.exp()
        step = format.full_scale(tiles, tiles.amin(-1).clamp_max(0), tiles.amax(-1).clamp_min(0)) * ratio
        inside = (rounded - weight).abs().reshape(tiles.shape) <= 0.5 * step.unsqueeze(-1) * (1 + 1e-6)
    descent.backward()
    moved = torch.where(inside.reshape(weight.shape), rounded - weight, rounded)
    pull = metric.times_gradient(metric.times_hessian(weight - rounded))
    expected = (-2 * pull * moved).reshape(tiles.shape).sum(-1) / metric.squared_norm(weight)
    assert not bool(inside.all()) or isinstance(format, TableFormat)
    assert torch.allclose(descent.log_ratio.grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_scaling_is_stored_and_exact():
    given = problem()
    found = decompose(given.weight, [QuantizeStage(FORMAT)], given.stats, transforms=(LearntScaling(FORMAT, steps=10),))
    assert isinstance(found.operator, Product) and isinstance(found.operator.terms[1], Diagonal)
    assert found.report.storage_bits == FORMAT.stored_bits((32, 48)) + 48 * 16
    assert any("scaling" in choice for choice in found.report.choices)
    built = recipe("omniquant", bits=3, group_size=16)
    report = decompose(given.weight, built.stages, given.stats, transforms=built.transforms).report
    plain = decompose(given.weight, built.stages, given.stats).report
    assert report.predicted_nats < plain.predicted_nats


def test_zero_weights_and_dead_inputs():
    stats = LayerStats.from_hessian(torch.diag(torch.tensor([1.0, 0.0] * 8)), tokens=4)
    report = decompose(
        torch.zeros(4, 16), [QuantizeStage(FORMAT)], stats, transforms=(LearntScaling(FORMAT, 4),)
    ).report
    assert report.relative_error == 0
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    report = decompose(weight, [QuantizeStage(FORMAT)], stats, transforms=(LearntScaling(FORMAT, 4),)).report
    assert 0 < report.relative_error < 1


def test_messages():
    with pytest.raises(RecipeError, match=r"LearntScaling\(steps=-1"):
        LearntScaling(FORMAT, steps=-1)
    with pytest.raises(FormatError, match="LearntScaling rounds to groups within rows; got e4m3 128x128"):
        LearntScaling(number_format("fp8_e4m3_block"))
    with pytest.raises(StatsError, match="LearntScaling needs calibration statistics"):
        decompose(torch.ones(4, 16), [QuantizeStage(FORMAT, method="rtn")], transforms=(LearntScaling(FORMAT),))
