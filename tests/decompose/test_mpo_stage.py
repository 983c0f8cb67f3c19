"""Matrix product operators as stages: sizes, the rival SVD, the certificate, compensated operators."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.decompose import BitsPerWeight, LowRankStage, MpoStage, Rank, RelativeError, decompose, recipe
from tnc.decompose.bond_curve import BondPoint, bond_curve
from tnc.decompose.rival import rival
from tnc.errors import BudgetError, RankError, RecipeError, ShapeError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.networks import als, mpo_lower_bound, tt_svd
from tnc.planning import PooledBonds, pooled_ranks
from tnc.terms import Mpo, Sum, dense64
from tnc.testing import make_problem, weighted_problems

PROBLEM = make_problem((24, 24), hessian="full", gradient="full", metric="fisher", heldout=True, seed=4)
FEW = settings(max_examples=max(settings.default.max_examples // 5, 10))


def error(operator, metric=PROBLEM.metric, problem=PROBLEM):
    return metric.relative(problem.weight.double() - dense64(operator), problem.weight.double())


@pytest.mark.parametrize("bits", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("cores", [2, 3])
def test_bits_are_met_and_used(bits, cores):
    found = decompose(PROBLEM.weight, (MpoStage(BitsPerWeight(bits), cores=cores),), PROBLEM.stats)
    assert found.report.bits_per_weight <= bits
    larger = decompose(PROBLEM.weight, (MpoStage(max(found.report.bonds) + 1, cores=cores, sweeps=0),), PROBLEM.stats)
    assert larger.report.bits_per_weight > bits


@pytest.mark.parametrize("eps", [0.5, 0.2])
@pytest.mark.parametrize("cores", [2, 3])
def test_relative_error_is_met_in_the_metric(eps, cores):
    found = decompose(PROBLEM.weight, (MpoStage(RelativeError(eps), cores=cores, sweeps=1),), PROBLEM.stats)
    assert error(found.operator) <= eps


def test_refinement_is_never_worse_than_either_start():
    found = decompose(PROBLEM.weight, (MpoStage(5),), PROBLEM.stats).operator
    outs, ins = found.out_modes, found.in_modes
    for metric in (None, PROBLEM.metric):
        assert error(found) <= error(tt_svd(PROBLEM.weight, outs, ins, max_rank=5, metric=metric))
    assert error(als(PROBLEM.weight, found, stats=PROBLEM.stats).mpo) <= error(found)


def test_a_compensated_operator_is_two_stages():
    alone = decompose(PROBLEM.weight, (MpoStage(4),), PROBLEM.stats)
    both = decompose(PROBLEM.weight, (MpoStage(4), LowRankStage(3)), PROBLEM.stats, sweeps=2)
    assert isinstance(both.operator, Sum)
    assert [term.kind for term in both.operator.terms] == ["mpo", "low_rank"]
    assert error(both.operator) < error(alone.operator)
    assert both.report.bonds == (4,)
    assert both.report.rank == 3


def test_every_report_shows_the_svd_of_the_same_bits():
    found = decompose(PROBLEM.weight, (MpoStage(8),), PROBLEM.stats)
    other = rival(PROBLEM.weight, found.operator, PROBLEM.stats)
    assert other.storage_bits <= found.operator.storage_bits < other.storage_bits + 2 * 32 * 24
    assert found.report.svd_relative_error == pytest.approx(error(other, Metric.full(PROBLEM.stats)), rel=1e-5)
    assert found.report.svd_predicted_nats > 0
    assert found.report.to_json()["bonds"] == [8]
    assert decompose(PROBLEM.weight, (LowRankStage(3),), PROBLEM.stats).report.svd_relative_error is None


@given(
    problem=weighted_problems(dtypes=(torch.float64,), scales=(1.0,)), rank=st.integers(1, 4), cores=st.integers(1, 3)
)
@FEW
def test_no_operator_beats_the_bound(problem, rank, cores):
    """Neither TT-SVD nor ALS, which knows the metric, goes below it."""
    stage = MpoStage(rank, cores=cores)
    outs, ins = stage.modes(tuple(problem.weight.shape))
    start = tt_svd(problem.weight, outs, ins, max_rank=rank)
    found = als(problem.weight, start, metric=problem.metric, sweeps=2).mpo
    bound, note = mpo_lower_bound(problem.weight, found, problem.metric)
    reached = problem.metric.norm(problem.weight - dense64(found))
    assert bound <= reached + 1e-7 * problem.scale
    assert (note is not None) == (found.padded and cores > 1)


def test_in_the_frobenius_norm_the_bound_of_two_cores_is_reached():
    weight = PROBLEM.weight.double()
    found = tt_svd(weight, (4, 6), (6, 4), max_rank=7)
    bound, _ = mpo_lower_bound(weight, found, Metric())
    assert bound == pytest.approx(float((weight - dense64(found)).norm()), rel=1e-9)


def test_a_bound_is_positive_in_a_full_metric():
    found = decompose(PROBLEM.weight, (MpoStage(4),), PROBLEM.stats)
    assert 0 < found.report.lower_bound < found.report.relative_error


def test_bond_zero_is_the_zero_matrix():
    found = decompose(PROBLEM.weight, (MpoStage(Rank(0)),), PROBLEM.stats)
    assert found.report.storage_bits == 0
    assert not found.operator.to_dense().any()
    assert found.report.relative_error == 1


def test_without_statistics_a_metric_is_a_fallback():
    found = decompose(PROBLEM.weight, (MpoStage(3, metric=Metric.fisher),))
    assert any("Frobenius" in note for note in found.report.fallbacks)
    assert not decompose(PROBLEM.weight, (MpoStage(3),)).report.fallbacks


def test_compactifai_is_plain_tt_svd():
    built = recipe("compactifai", rank=5, cores=3)
    found = decompose(PROBLEM.weight, built.stages, PROBLEM.stats).operator
    expected = tt_svd(PROBLEM.weight, found.out_modes, found.in_modes, max_rank=5)
    assert isinstance(found, Mpo)
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_input_is_checked():
    weight, stats = PROBLEM.weight, PROBLEM.stats
    with pytest.raises(RecipeError, match="cores"):
        MpoStage(3, cores=0)
    with pytest.raises(RecipeError, match="both mode lists"):
        MpoStage(3, out_modes=(4, 6))
    with pytest.raises(ShapeError, match="Factorizations"):
        decompose(weight, (MpoStage(3, out_modes=(4, 5), in_modes=(4, 6)),), stats)
    with pytest.raises(BudgetError, match="at least"):
        decompose(weight, (MpoStage(BitsPerWeight(0.01)),), stats)
    with pytest.raises(RankError, match="positive integer"):
        decompose(weight, (MpoStage(-1),), stats)
    with pytest.raises(RecipeError, match="needs BitsPerWeight"):
        recipe("mpo_pooled", rank=3)


@pytest.mark.parametrize("cores", [2, 3])
def test_a_curve_is_what_the_stage_reaches_where_it_was_measured(cores):
    stage = MpoStage(1, cores=cores, sweeps=1)
    curve = stage.curve(PROBLEM.weight, PROBLEM.stats, torch.float32)
    assert curve[0].bonds == (0,) * (cores - 1)
    assert curve[0].nats == pytest.approx(PROBLEM.metric.nats(PROBLEM.weight.double()))
    nats, bits = [point.nats for point in curve], [point.bits for point in curve]
    assert nats == sorted(nats, reverse=True)
    assert bits == sorted(bits)
    assert bits[-1] < 32 * 24 * 24 <= stage.stored_bits((24, 24), torch.float32, len(curve))
    for point in (curve[1], curve[-1]):
        found = decompose(PROBLEM.weight, (MpoStage(point.bonds, cores=cores, sweeps=1),), PROBLEM.stats).operator
        assert point.nats == pytest.approx(PROBLEM.metric.nats(PROBLEM.weight.double() - dense64(found)), rel=1e-6)
        assert point.bits == found.storage_bits


def test_between_measured_sizes_a_power_law_is_exact():
    choices = [((k,), 100 * k) for k in range(1, 40)]
    asked = []

    def law(bonds):
        asked.append(bonds[0])
        return bonds[0] ** -1.5

    curve = bond_curve(choices, BondPoint((0,), 0, 4.0), law, 4)
    assert len(asked) == 4
    assert {1, 39} < set(asked)
    assert [point.nats for point in curve] == pytest.approx([4.0, *(k**-1.5 for k in range(1, 40))])
    flat = bond_curve(choices, BondPoint((0,), 0, 4.0), lambda bonds: 9.0 if bonds[0] < 20 else 0.0, 3)
    assert [point.nats for point in flat] == sorted((point.nats for point in flat), reverse=True)
    assert max(point.nats for point in flat) == 4.0
    assert bond_curve([], BondPoint((0,), 0, 4.0), law, 4) == (BondPoint((0,), 0, 4.0),)


def test_bonds_may_be_given_one_by_one():
    found = decompose(PROBLEM.weight, (MpoStage((3, 5), cores=3),), PROBLEM.stats)
    assert found.report.bonds == (3, 5)
    assert found.report.storage_bits == MpoStage((3, 5), cores=3).stored_bits((24, 24), torch.float32, (3, 5))
    assert decompose(PROBLEM.weight, (MpoStage((0, 0), cores=3),), PROBLEM.stats).report.storage_bits == 0
    with pytest.raises(RankError, match="2 of them"):
        decompose(PROBLEM.weight, (MpoStage((3, 5, 7), cores=3),), PROBLEM.stats)


LAYERS = [
    make_problem((24, 24), spectrum=spectrum, hessian="full", gradient="full", metric="fisher", seed=seed)
    for seed, spectrum in enumerate(("exponential", "power", "low_rank_noise", "flat"))
]


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize(("bits", "core_format"), [(5.0, None), (12.0, None), (4.0, IntFormat(8, 16, pad=True))])
def test_pooled_bonds_are_never_worse_than_one_limit_for_all(cores, bits, core_format):
    """At no more bits: as predicted by the curves, and as decomposed."""
    stage = MpoStage(BitsPerWeight(bits), cores=cores, core_format=core_format, sweeps=1)
    curves = {
        str(k): PooledBonds(stage.curve(problem.weight, problem.stats, torch.float32), (24, 24), dense_bits=32)
        for k, problem in enumerate(LAYERS)
    }
    plan = pooled_ranks(curves, bits)
    limit = stage.bond((24, 24), torch.float32)
    uniform = sum(layer.points[limit].nats for layer in curves.values())
    assert plan.storage_bits <= bits * len(LAYERS) * 24 * 24
    assert plan.lower_bound_nats <= plan.predicted_nats <= uniform * (1 + 1e-9)
    reached = dict.fromkeys(("pooled", "one limit"), 0.0)
    for problem, bonds in zip(LAYERS, plan.ranks.values(), strict=True):
        for name, size in (("pooled", bonds), ("one limit", limit)):
            if size is not None:
                found = decompose(problem.weight, (replace(stage, rank=size),), problem.stats).operator
                reached[name] += problem.metric.nats(problem.weight.double() - dense64(found))
    assert reached["pooled"] < reached["one limit"]
