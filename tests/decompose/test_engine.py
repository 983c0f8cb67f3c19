"""The engine, its reports and certificates."""

import json
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies_matrices import (
    brute_squared_norm,
    gaussian,
    generator,
    oracle_sigma,
    problems,
    well_conditioned,
    whole,
)  # fmt: skip

from tnc.column_space import Subspace
from tnc.decompose import (
    BitsPerWeight,
    DenseStage,
    LowRankStage,
    QuantizeStage,
    Rank,
    RelativeError,
    Target,
    decompose,
    measure,
)  # fmt: skip
from tnc.decompose.certificate import lower_bound
from tnc.errors import NonFiniteError, RankError, RecipeError, ShapeError, StatsError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Dense, LowRank, Product, Quantized, Sum, dense64

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
MILD = st.sampled_from([1e-2, 1.0, 1e2])


def relative(error, weight, H, G=None):
    size, reference = (max(brute_squared_norm(e, H, G), 0.0) ** 0.5 for e in (error, weight))
    return size / reference if reference else (0.0 if size == 0 else float("inf"))


@given(problem=problems(scales=MILD), data=st.data(), dtype=DTYPES, method=st.sampled_from(["none", "rtn", "gptq"]),
       heldout=st.booleans())  # fmt: skip
def test_report_is_what_brute_force_finds(problem, data, dtype, method, heldout):
    weight, stats = problem.weight.to(dtype), problem.stats(heldout=heldout)
    rank = data.draw(st.integers(0, problem.limit))
    base = [] if method == "none" else [QuantizeStage(IntFormat(3), method=method)]
    result = decompose(weight, [*base, LowRankStage(Rank(rank, forced=True), metric=Metric.full)], stats)
    report, operator = result.report, result.operator
    error, n = weight.double() - dense64(operator), weight.shape[1]
    if (
        whole(problem) > 0
        and relative(weight, weight, problem.H)
        and brute_squared_norm(weight, problem.H, None) > 1e-9 * float(weight.double().norm() ** 2 * problem.H.norm())
    ):
        assert report.relative_error == pytest.approx(relative(error, weight, problem.H), rel=1e-6, abs=1e-6)
        # the low-rank problem is solved before storage rounding, which is a few eps of each component
        assert report.relative_error <= report.guaranteed_error * (1 + 1e-6) + 300 * torch.finfo(dtype).eps + 1e-6
    assert report.lower_bound <= report.relative_error
    if heldout:
        H = stats.heldout.second
        assert report.heldout_relative_error == pytest.approx(relative(error, weight, H), rel=1e-6, abs=1e-6)
    else:
        H = problem.H
        assert report.heldout_relative_error is None
    if problem.G is None:
        assert report.predicted_nats is None
    else:
        scale = float(error.norm() ** 2 * H.norm() * problem.G.norm())
        assert abs(report.predicted_nats - brute_squared_norm(error, H, problem.G) / 2) <= 1e-12 * scale
    stored = sum(t.numel() * t.element_size() * 8 for t in operator.tensors().values())
    assert (report.storage_bits, report.bits_per_weight) == (stored, stored / weight.numel())
    assert (report.rank, report.shape, report.tokens) == (rank, tuple(weight.shape), 50)
    assert report.bits == (None if method == "none" else 3)
    assert report.hessian_rank == stats.inputs.rank <= n
    assert (report.damping is None) == (method != "gptq")
    assert report.seconds >= 0
    assert json.loads(json.dumps(report.to_json()))["shape"] == list(weight.shape)


@given(problem=problems(), data=st.data(), storage=st.sampled_from([torch.float64, torch.bfloat16]))
def test_lower_bound_is_the_tail_for_the_base_and_never_above_the_error(problem, data, storage):
    rank = data.draw(st.integers(0, problem.limit))
    base = Dense(problem.weight + float(problem.weight.norm()) * gaussian(*problem.weight.shape, generator(1)))
    for stages_base in ((), (base,)):
        residual = problem.weight - sum(dense64(t) for t in stages_base)
        g = generator(2)
        best = LowRankStage(rank, metric=Metric.full, dtype=storage)
        fitted = best.fit(Target(residual, problem.weight, problem.stats(), 0)).term
        other = LowRank(gaussian(residual.shape[0], rank, g), gaussian(rank, residual.shape[1], g))
        for term in (fitted, other):
            operator = Sum((*stages_base, term))
            bound, note = lower_bound(problem.weight, operator, Metric(problem.H))
            tail = float(oracle_sigma(residual, problem.H, None)[rank:].norm())
            scale = float(residual.norm() ** 2 * problem.H.norm()) ** 0.5
            assert tail - 1e-5 * scale <= bound <= tail + 1e-9 * scale
            assert note is None
            report = measure(problem.weight, operator, problem.stats())
            assert report.lower_bound <= report.relative_error


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_the_bound_of_an_exact_factorization_is_zero(rank):
    g = generator(rank)
    weight = gaussian(8, 2, g) @ gaussian(2, 9, g)
    report = decompose(
        weight, [LowRankStage(Rank(rank, forced=True))], LayerStats.from_hessian(torch.eye(9), tokens=3)
    ).report
    assert report.lower_bound == 0
    assert report.relative_error < 1e-12


def test_wide_layers_are_measured_in_float32_and_still_bounded(monkeypatch):
    monkeypatch.setattr(import_module("tnc.decompose.report"), "_DOUBLE_LIMIT", 8)
    for seed in range(20):
        problem = well_conditioned(12, 16, seed)
        report = decompose(problem.weight, [LowRankStage(4)], problem.stats()).report
        exact = oracle_sigma(problem.weight, problem.H, None)
        assert report.lower_bound <= report.relative_error
        assert report.relative_error == pytest.approx(float(exact[4:].norm() / exact.norm()), rel=1e-5)


def test_spectrum_limit_is_noted(monkeypatch):
    monkeypatch.setattr(import_module("tnc.decompose.certificate"), "SPECTRUM_LIMIT", 3)
    report = decompose(torch.eye(4), [LowRankStage(2)]).report
    assert report.lower_bound == 0
    assert report.fallbacks == ("lower bound not computed: smaller side above 3",)


def test_no_bound_for_other_forms():
    weight, left, right = torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 3)
    two = Sum((LowRank(left, right), LowRank(left, right)))
    assert lower_bound(weight, two, Metric()) == (0.0, None)
    assert lower_bound(weight, Product((Dense(left), Dense(right))), Metric()) == (0.0, None)
    assert measure(weight, two, None).rank == 2
    assert measure(weight, Dense(weight), None).rank is None


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("statistics", [False, True])
def test_quantized_bound(method, statistics):
    problem = well_conditioned(8, 12, 1)
    if method == "gptq" and not statistics:
        return
    report = decompose(
        problem.weight, [QuantizeStage(IntFormat(3), method=method)], problem.stats() if statistics else None
    ).report
    assert 0 < report.lower_bound <= report.relative_error
    if not statistics:  # rounding to nearest is the optimum of its own grid
        assert report.lower_bound == pytest.approx(report.relative_error, rel=1e-6)


def test_guarantee_wherever_the_metric_is_the_full_hessian():
    problem = well_conditioned(10, 12, 2)
    exact = oracle_sigma(problem.weight, problem.H, None)
    tail = float(exact[3:].norm() / exact.norm())
    for stage in (LowRankStage(3), LowRankStage(3, metric=Metric.full)):
        assert decompose(problem.weight, [stage], problem.stats()).report.guaranteed_error == pytest.approx(tail)
    plain = torch.linalg.svdvals(problem.weight)
    report = decompose(problem.weight, [LowRankStage(3)]).report
    assert report.guaranteed_error == pytest.approx(float(plain[3:].norm() / plain.norm()))
    subspace = decompose(problem.weight, [LowRankStage(3, solver=Subspace(0, 1))], problem.stats()).report
    assert subspace.guaranteed_error == pytest.approx(subspace.relative_error)
    assert subspace.guaranteed_error > tail * 1.001
    for metric in (Metric.identity, Metric.rms):
        assert (
            decompose(problem.weight, [LowRankStage(3, metric=metric)], problem.stats()).report.guaranteed_error is None
        )
    fisher = well_conditioned(10, 12, 2, fisher=True)
    assert decompose(fisher.weight, [LowRankStage(3)], fisher.stats()).report.guaranteed_error is None


@given(seed=st.integers(0, 99), fisher=st.booleans(), low_rank_first=st.booleans())
def test_more_sweeps_are_never_worse(seed, fisher, low_rank_first):
    problem = well_conditioned(8, 12, seed, fisher=fisher)
    stages = [QuantizeStage(IntFormat(2), clip_ratios=(1.0,)), LowRankStage(2)]
    stages = stages[::-1] if low_rank_first else stages
    errors = []
    for sweeps in (1, 2, 4):
        operator = decompose(problem.weight, stages, problem.stats(), sweeps=sweeps).operator
        kinds = ["quantized", "low_rank"]
        assert [t.kind for t in operator.terms] == (kinds[::-1] if low_rank_first else kinds)
        errors.append(problem.metric.norm(problem.weight - dense64(operator)))
    assert errors[2] <= errors[1] * (1 + 1e-12) <= errors[0] * (1 + 2e-12)


class Recorder:
    """A stage that stores given matrices one after another and keeps what it was asked."""

    def __init__(self, *matrices):
        self.matrices, self.targets = list(matrices), []

    def fit(self, target):
        self.targets.append(target)
        return type(DenseStage().fit(target))(
            Dense(self.matrices[len(self.targets) - 1]), damping=0.5, fallbacks=("noted",)
        )


def test_residuals_are_of_the_other_terms_as_stored_and_the_best_sweep_is_kept():
    weight = torch.ones(2, 2)
    # as float16: 0.3 is not exact, so a residual of unrounded values would show
    a, b = (
        Recorder(*(torch.full((2, 2), v, dtype=torch.float16) for v in values))
        for values in ((0.3, 0.6, 9.0), (0.1, 0.3, 9.0))
    )
    result = decompose(weight, [a, b], sweeps=3)
    seen = [float(t.residual[0, 0]) for t in (*a.targets, *b.targets)]
    half = {v: float(torch.tensor(v, dtype=torch.float16)) for v in (0.1, 0.3, 0.6)}
    assert seen == [1, 1 - half[0.1], 1 - half[0.3], 1 - half[0.3], 1 - half[0.6], 1 - 9]
    assert [float(t.matrix[0, 0]) for t in result.operator.terms] == [half[0.6], half[0.3]]
    assert [t.spent_bits for t in a.targets] == [0, 64, 64]
    assert [t.spent_bits for t in b.targets] == [64, 64, 64]
    assert a.targets[0].residual.dtype == torch.float64
    assert a.targets[0].weight is weight
    assert (result.report.damping, result.report.fallbacks) == (0.5, ("noted", "noted"))


def test_order_of_stages_matters():
    problem = well_conditioned(8, 12, 0)
    pair = [QuantizeStage(IntFormat(2)), LowRankStage(2)]
    first, second = (decompose(problem.weight, stages, problem.stats()) for stages in (pair, pair[::-1]))
    assert [type(t) for t in first.operator.terms] == [Quantized, LowRank]
    assert [type(t) for t in second.operator.terms] == [LowRank, Quantized]
    assert first.report.relative_error != second.report.relative_error
    assert second.report.guaranteed_error is None  # the quantizer comes last


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_stage_copies(dtype):
    weight = torch.ones(2, 3, dtype=dtype)
    result = decompose(weight, [DenseStage()])
    assert isinstance(result.operator, Dense)
    result.operator.matrix.zero_()
    assert weight.all()
    assert result.operator.matrix.dtype == dtype
    assert (result.report.relative_error, result.report.lower_bound) == (0, 0)
    assert DenseStage(torch.float16).fit(Target(weight.double(), weight, None, 0)).term.matrix.dtype == torch.float16


def test_sizes_reach_the_stage():
    problem = well_conditioned(32, 24, 0)
    weight = problem.weight.bfloat16()
    stages = [QuantizeStage(IntFormat(3, group_size=12)), LowRankStage(BitsPerWeight(7.5))]
    report = decompose(weight, stages, problem.stats()).report
    assert 7.5 - (32 + 24) * 16 / weight.numel() < report.bits_per_weight <= 7.5
    report = decompose(
        weight, [stages[0], LowRankStage(RelativeError(0.05), metric=Metric.full)], problem.stats()
    ).report
    assert report.relative_error <= 0.05


def test_without_statistics_a_named_metric_is_not_silently_replaced():
    weight = gaussian(5, 6, generator(0))
    note = "no statistics: low rank in the Frobenius norm"
    assert decompose(weight, [LowRankStage(2, metric=Metric.full)]).report.fallbacks == (note,)
    for metric in (Metric.auto, Metric.identity):
        assert decompose(weight, [LowRankStage(2, metric=metric)]).report.fallbacks == ()


def test_weight_is_not_changed():
    problem = well_conditioned(8, 12, 3, fisher=True)
    copies = [t.clone() for t in (problem.weight, problem.H, problem.G)]
    decompose(problem.weight, [QuantizeStage(IntFormat(2)), LowRankStage(2)], problem.stats(), sweeps=2)
    assert all(map(torch.equal, (problem.weight, problem.H, problem.G), copies))


def test_bad_input():
    weight = torch.ones(2, 3)
    with pytest.raises(RecipeError, match=r"got 0 stages and sweeps=1; expected at least one of each"):
        decompose(weight, [])
    with pytest.raises(RecipeError, match=r"got 1 stages and sweeps=0"):
        decompose(weight, [LowRankStage(1)], sweeps=0)
    with pytest.raises(NonFiniteError, match=r"weight holds 6 NaN or Inf of 6"):
        decompose(weight * torch.inf, [LowRankStage(1)])
    with pytest.raises(ShapeError, match=r"weight is a torch.float32 tensor of shape"):
        decompose(torch.ones(3), [LowRankStage(1)])
    with pytest.raises(StatsError, match=r"in_features=4"):
        decompose(weight, [LowRankStage(1)], LayerStats.from_hessian(torch.eye(4), tokens=1))
    with pytest.raises(StatsError, match=r"gptq needs calibration statistics; pass stats=..., or use method='rtn'"):
        decompose(weight, [QuantizeStage(IntFormat(3))])
    with pytest.raises(RecipeError, match=r"method='magic' is unknown; expected one of .*gptq"):
        QuantizeStage(IntFormat(3), method="magic")


@pytest.mark.parametrize(("shape", "limit"), [((8, 9), 4), ((1, 9), 0), ((5, 5), 2), ((3, 2000), 2)])
def test_a_rank_that_stores_more_than_the_matrix_is_refused_unless_forced(shape, limit):
    weight = gaussian(*shape, generator(0))
    assert decompose(weight, [LowRankStage(limit)]).report.rank == limit
    message = (
        rf"rank={limit + 1}\) is above the useful limit mn/\(m\+n\) = {limit} of a weight .*Use a rank <= {limit}, or"
    )
    with pytest.raises(RankError, match=message):
        decompose(weight, [LowRankStage(limit + 1)])
    assert decompose(weight, [LowRankStage(Rank(limit + 1, forced=True))]).report.rank == limit + 1
    with pytest.raises(RankError, match=r"is outside 0 <= rank <= min\(weight.shape\)"):
        decompose(weight, [LowRankStage(min(shape) + 1)])
