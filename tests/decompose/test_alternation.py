"""Alternation keeps the best iterate and stops when it stands still; starts, orders and held-out choices of H."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import gaussian, generator, psd, well_conditioned

from tnc.decompose import (
    BitsPerWeight,
    DenseStage,
    Gate,
    LowRankStage,
    QuantizeStage,
    Rank,
    compensate,
    decompose,
    recipe,
    truncated_svd,
)  # fmt: skip
from tnc.errors import RecipeError, StatsError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.quant import gptq
from tnc.stats import LayerStats, Moments
from tnc.terms import Dense, LowRank, Sum, dense64

FORMAT = IntFormat(2, group_size=8)
ALTERNATING = ("loftq", "caldera", "odlri", "svdquant", "srr", "qlr_alternating", "qlr_gated", "qlr_shared")


def error(problem, operator):
    return problem.metric.norm(problem.weight - dense64(operator))


def run(problem, name, **options):
    built = recipe(name, bits=2, group_size=8, rank=4, **options)
    return decompose(problem.weight, built.stages, problem.stats(heldout=True), sweeps=built.sweeps).operator


class Scripted:
    """A stage whose fits are given matrices; counts them and keeps the sweeps it was told."""

    def __init__(self, *values):
        self.values, self.sweeps = list(values), []

    def fit(self, target):
        self.sweeps.append(target.sweep)
        value = self.values[len(self.sweeps) - 1]
        return DenseStage().fit(type(target)(torch.full((1, 1), value), target.weight, None, 0))


def test_the_best_iterate_is_kept_also_within_a_sweep():
    a, b = Scripted(0.5, 0.9, 0.2), Scripted(0.2, 0.6, 0.3)
    result = decompose(torch.ones(1, 1), [a, b], sweeps=3)  # 0.7; 1.1, then 1.5; 0.8, 0.5
    assert [float(t.matrix) for t in result.operator.terms] == pytest.approx([0.9, 0.2])
    assert a.sweeps == b.sweeps == [0, 1, 2]


def test_a_sweep_that_gains_nothing_is_the_last():
    a, b = Scripted(0.5, 0.5, 0.8), Scripted(0.25, 0.25, 0.2)
    result = decompose(torch.ones(1, 1), [a, b], sweeps=9)
    assert [float(t.matrix) for t in result.operator.terms] == [0.5, 0.25]
    assert a.sweeps == [0, 1]


@pytest.mark.parametrize("name", ALTERNATING)
@pytest.mark.parametrize("factor_bits", [None, 8])
def test_more_sweeps_are_never_worse_and_the_base_alone_is_worse(name, factor_bits):
    problem = well_conditioned(16, 24, 1, fisher=True)
    errors = [error(problem, run(problem, name, sweeps=sweeps, factor_bits=factor_bits)) for sweeps in (1, 2, 4)]
    assert errors[2] <= errors[1] * (1 + 1e-12) <= errors[0] * (1 + 2e-12)
    assert errors[2] < error(problem, gptq(problem.weight, problem.stats(), FORMAT))


def test_two_sweeps_by_hand():
    """LoftQ's loop written out (arXiv:2310.08659, algorithm 1), with GPTQ and the metric of the problem."""
    problem = well_conditioned(16, 24, 2, fisher=True)
    stats, iterates, low_rank = problem.stats(), [], torch.zeros_like(problem.weight)
    for _ in range(2):
        base = gptq(problem.weight - low_rank, stats, FORMAT)
        if iterates:
            iterates.append(dense64(base) + low_rank)
        low_rank = dense64(compensate(problem.weight, base, 4, stats=stats))
        iterates.append(dense64(base) + low_rank)
    best = min(problem.metric.norm(problem.weight - each) for each in iterates)
    found = error(problem, run(problem, "qlr_alternating"))
    assert found == pytest.approx(best, rel=1e-9)


def test_starts_of_the_first_sweep():
    problem = well_conditioned(16, 24, 3, fisher=True)
    stats = problem.stats()
    expected = {
        "caldera": truncated_svd(problem.weight, 4, metric=Metric.full(stats)),
        "svdquant": truncated_svd(problem.weight, 4),
        "odlri": truncated_svd(problem.weight, 4, metric=Metric.salient(stats, channels=4)),
        "srr": truncated_svd(problem.weight, 2, metric=problem.metric),
    }
    for name, start in expected.items():
        first, second = run(problem, name, sweeps=1).terms
        torch.testing.assert_close(dense64(first), dense64(start))
        base = gptq(problem.weight - dense64(first), stats, FORMAT)
        assert torch.equal(second.codes, base.codes)


def test_a_start_stores_its_factors_as_the_stage_it_stands_for():
    weight = gaussian(8, 16, generator(0))
    stage = LowRankStage(4, dtype=torch.float16, factor_format=IntFormat(4), first=LowRankStage(2))
    left, right = decompose(weight, [stage]).operator.terms
    assert (left.shape, left.format, right.format) == ((8, 2), IntFormat(4), IntFormat(4))
    stage = LowRankStage(4, dtype=torch.float16, first=LowRankStage(2))
    assert decompose(weight, [stage]).operator.left.dtype == torch.float16


@pytest.mark.parametrize("factor_format", [None, IntFormat(4)])
def test_a_rank_fitted_before_its_base_leaves_room_for_it(factor_format):
    weight = gaussian(32, 64, generator(0)).bfloat16()
    stages = [LowRankStage(BitsPerWeight(5), factor_format=factor_format), QuantizeStage(IntFormat(3), method="rtn")]
    first, again = (decompose(weight, stages, sweeps=sweeps).report for sweeps in (1, 2))
    assert 4.5 < first.bits_per_weight <= 5
    assert again.bits_per_weight == first.bits_per_weight


@given(seed=st.integers(0, 99), channels=st.integers(1, 12), fisher=st.booleans())
def test_salient_metric_sees_the_largest_inputs_only(seed, channels, fisher):
    problem = well_conditioned(6, 9, seed, fisher=fisher)
    metric = Metric.salient(problem.stats(), channels=channels)
    chosen = torch.topk(problem.H.diagonal(), min(channels, 9)).indices
    kept = torch.zeros_like(problem.weight)
    kept[:, chosen] = problem.weight[:, chosen]
    assert metric.norm(problem.weight) == pytest.approx(problem.metric.norm(kept))


@given(seed=st.integers(0, 99), rho=st.floats(0, 1), fisher=st.booleans())
def test_shrunk_metric_is_the_mixture(seed, rho, fisher):
    problem = well_conditioned(6, 9, seed, fisher=fisher)
    diagonal = Metric(torch.diag(problem.H.diagonal()), problem.G)
    expected = (1 - rho) * problem.metric.squared_norm(problem.weight) + rho * diagonal.squared_norm(problem.weight)
    before = problem.H.clone()
    assert Metric.shrunk(problem.stats(), rho).squared_norm(problem.weight) == pytest.approx(expected)
    assert torch.equal(problem.H, before)


def overfitted(seed, tokens):
    """A layer whose calibration H comes from few tokens of an isotropic input; the held-out H from many."""
    g = generator(seed)
    few, many = psd(24, tokens, 1.0, g), psd(24, 2000, 1.0, g)
    stats = LayerStats(Moments(few, None, tokens), Moments(many, None, 2000))
    return gaussian(16, 24, g), stats


def heldout(weight, stats, operator):
    return Metric(stats.heldout.second).relative(weight - dense64(operator), weight)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), tokens=st.sampled_from([3, 12, 48, 1000]))
def test_the_gate_keeps_the_best_on_held_out_tokens_and_reports_all(seed, tokens):
    weight, stats = overfitted(seed, tokens)
    rhos = (0.0, 0.2, 1.0)
    each = {
        name: heldout(weight, stats, truncated_svd(weight, 4, metric=Metric.shrunk(stats, rho)))
        for name, rho in zip(("full", "shrunk(0.2)", "diagonal"), rhos, strict=True)
    }
    result = decompose(weight, [LowRankStage(4, metric=Gate(rhos))], stats)
    assert heldout(weight, stats, result.operator) == pytest.approx(min(each.values()))
    (choice,) = result.report.choices
    best = min(each, key=each.get)
    listed = ", ".join(f"{name} {value:.6f}" for name, value in each.items())
    assert choice == f"metric = {best} by held-out error of {listed}"


def test_few_tokens_choose_the_diagonal_and_many_the_full_moment():
    weight, stats = overfitted(0, 3)
    report = decompose(weight, [LowRankStage(4, metric=Gate((0.0, 1.0)))], stats).report
    assert report.choices[0].startswith("metric = diagonal by")
    same = LayerStats(stats.heldout, stats.heldout)
    report = decompose(weight, [LowRankStage(4, metric=Gate((0.0, 1.0)))], same).report
    assert report.choices[0].startswith("metric = full by")


def test_without_held_out_tokens_the_gate_says_so():
    problem = well_conditioned(8, 12, 0, fisher=True)
    report = decompose(problem.weight, [LowRankStage(3, metric=Gate())], problem.stats()).report
    assert report.fallbacks == ("no held-out tokens to choose the metric by: all of H",)
    assert report.choices == ()
    assert decompose(problem.weight, [LowRankStage(3, metric=Gate())]).report.fallbacks == report.fallbacks


def test_low_rank_terms_of_a_sum_are_bounded_together():
    problem = well_conditioned(12, 16, 0)
    stages = [LowRankStage(2), QuantizeStage(IntFormat(3)), LowRankStage(3)]
    result = decompose(problem.weight, stages, problem.stats())
    base = result.operator.terms[1]
    joint = compensate(problem.weight, base, 5, metric=problem.metric)
    expected = problem.metric.relative(problem.weight - dense64(Sum((base, joint))), problem.weight)
    assert result.report.lower_bound == pytest.approx(expected, rel=1e-6)
    assert result.report.rank == 5


def test_bad_input():
    stats = LayerStats.from_hessian(torch.eye(4), tokens=1)
    with pytest.raises(StatsError, match=r"shrunk\(rho=1\.5\) is outside \[0, 1\]"):
        Metric.shrunk(stats, 1.5)
    with pytest.raises(StatsError, match=r"salient\(channels=0\) sees no input; expected at least 1"):
        Metric.salient(stats, channels=0)
    for rhos in ((), (0.5, 2.0)):
        with pytest.raises(RecipeError, match=r"Gate\(rhos=.*needs one or more shrinkages in \[0, 1\]"):
            Gate(rhos)
    for name in ("odlri", "srr"):
        with pytest.raises(RecipeError, match=rf"{name}\(rank=BitsPerWeight\(value=4\)\) starts from a share"):
            recipe(name, bits=2, rank=BitsPerWeight(4))
    assert recipe("srr", bits=2, rank=Rank(5)).stages[0].first.rank == 2
    assert isinstance(recipe("odlri", bits=2, rank=5).stages[0].first.metric, partial)
    assert isinstance(decompose(torch.ones(1, 1), [Scripted(1.0)]).operator, Dense)
    assert isinstance(run(well_conditioned(8, 16, 0), "svdquant", sweeps=1).terms[0], LowRank)
