"""Quantized factors: a spread basis, exact refits, feedback in both metrics, budgets kept as stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import gaussian, generator, oracle_sigma, problems, sym_root, well_conditioned, whole

from tnc.decompose import (
    BitsPerWeight,
    FactorFormats,
    LowRankStage,
    QuantizeStage,
    Rank,
    RelativeError,
    decompose,
    quantize_factors,
    truncated_svd,
)  # fmt: skip
from tnc.decompose.factor_basis import spread
from tnc.decompose.factors import refit_right
from tnc.errors import BudgetError, FormatError, RankError, RecipeError
from tnc.formats import IntFormat, number_format
from tnc.metric import Metric
from tnc.quant import QUANTIZERS, QuantizerEntry, QuantizerResult, gptq, rtn
from tnc.stats import LayerStats
from tnc.terms import LowRank, Product, Quantized, dense64

BITS = st.sampled_from([2, 3, 4, 8])
FEW = 25  # an example takes up to 50 ms


def fitted(problem, rank, bits=8, **options):
    floats = truncated_svd(problem.weight, rank, metric=problem.metric)
    return quantize_factors(problem.weight, floats, problem.metric, FactorFormats.of(IntFormat(bits)), **options)


def error(problem, term):
    return problem.metric.norm(problem.weight - dense64(term))


@given(problem=problems(), data=st.data())
def test_spreading_keeps_the_product_and_evens_the_components(problem, data):
    rank = data.draw(st.integers(1, problem.limit))
    term = truncated_svd(problem.weight, rank, metric=problem.metric)
    (left,), right = spread([term.left], term.right, [problem.metric])
    product = term.left @ term.right
    length = float(left.norm() * right.norm())  # for singular G far above that of the product
    torch.testing.assert_close(left @ right, product, rtol=0, atol=1e-13 * length)
    side = problem.G if problem.G is not None else torch.eye(len(term.left), dtype=torch.float64)
    weights = (term.left * (side @ term.left)).sum(0).clamp_min(0).sqrt()
    expected = float(weights @ term.right.norm(dim=1))  # (Σ g r)², see `spread`
    found = Metric(None, problem.G).norm(left) * float(right.norm())
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7 * length * float(side.norm()) ** 0.5)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_left_is_the_least_squares_optimum_for_the_right_as_stored(shape, fisher):
    """Oracle: the least-squares problem itself, in roots of G and H."""
    problem = well_conditioned(*shape, 3, fisher=fisher)
    term = fitted(problem, 4).term
    right = dense64(term.terms[1])
    root = sym_root(problem.H)
    left = torch.linalg.lstsq((right @ root).T, (problem.weight @ root).T).solution.T
    if fisher:  # the same left whatever G: solved with it, entry by entry
        side = sym_root(problem.G)
        system = torch.kron(side.contiguous(), (right @ root).T.contiguous())
        solved = torch.linalg.lstsq(system, (side @ problem.weight @ root).reshape(-1, 1)).solution
        torch.testing.assert_close(solved.reshape(left.shape), left, rtol=1e-6, atol=1e-8)
    best = problem.metric.norm(problem.weight - left @ right)
    rounding = problem.metric.norm((left - dense64(term.terms[0])) @ right)
    assert error(problem, term) ** 2 == pytest.approx(best**2 + rounding**2, rel=1e-9)  # Pythagoras
    assert rounding < 0.02 * best


@given(problem=problems(), data=st.data())
def test_right_is_refitted_to_a_stationary_point(problem, data):
    left = gaussian(len(problem.weight), data.draw(st.integers(1, problem.limit)), generator(problem.seed))
    rest = problem.weight - left @ refit_right([problem.weight], [left], [problem.metric])
    weighted = problem.metric.times_gradient(left)
    assert float((weighted.T @ rest).norm()) <= 1e-5 * float(weighted.norm() * problem.weight.norm())


@pytest.mark.parametrize("fisher", [False, True])
def test_a_round_is_gptq_in_the_two_metrics(fisher):
    problem = well_conditioned(9, 14, 5, fisher=fisher)
    floats = truncated_svd(problem.weight, 4, metric=problem.metric)
    found = fitted(problem, 4, 3, rounds=1).term
    statistics = LayerStats.from_hessian(problem.H, tokens=1)
    right = gptq(spread([floats.left], floats.right, [problem.metric])[1], statistics, IntFormat(3))
    assert torch.equal(found.terms[1].codes, right.codes)
    gram = dense64(right) @ problem.H @ dense64(right).T
    left = problem.weight @ problem.H @ dense64(right).T @ torch.linalg.inv(gram)
    left = gptq(left, LayerStats.from_hessian(gram, tokens=1), IntFormat(3))
    torch.testing.assert_close(dense64(found.terms[0]), dense64(left), rtol=1e-3, atol=1e-6)


@settings(max_examples=FEW)
@given(seed=st.integers(0, 99), fisher=st.booleans(), m=st.integers(2, 24), n=st.integers(2, 24), data=st.data())
def test_eight_bits_are_close_to_floats_and_no_factors_beat_the_tail(seed, fisher, m, n, data):
    problem = well_conditioned(m, n, seed, fisher=fisher)
    rank = data.draw(st.integers(1, min(m, n)))
    sigma = oracle_sigma(problem.weight, problem.H, problem.G)
    tail, size = float(sigma[rank:].norm()), float(sigma.norm())
    found = error(problem, fitted(problem, rank, bits=8).term)
    assert tail - 1e-6 * size <= found <= tail + 0.02 * size


@settings(max_examples=FEW)
@given(seed=st.integers(0, 99), fisher=st.booleans(), bits=BITS)
def test_signs_that_an_eigensolver_may_return_either_way_change_nothing(seed, fisher, bits):
    problem = well_conditioned(10, 14, seed, fisher=fisher)
    floats = truncated_svd(problem.weight, 4, metric=problem.metric)
    signs = torch.where(torch.rand(4, generator=generator(seed)) < 0.5, -1.0, 1.0).to(floats.left.dtype)
    flipped = LowRank(floats.left * signs, floats.right * signs[:, None])
    formats = FactorFormats.of(IntFormat(bits))
    one, other = (dense64(quantize_factors(problem.weight, f, problem.metric, formats).term) for f in (floats, flipped))
    assert torch.equal(one, other)


@settings(max_examples=FEW)
@given(seed=st.integers(0, 99), fisher=st.booleans(), bits=BITS)
def test_more_rounds_are_never_worse(seed, fisher, bits):
    problem = well_conditioned(10, 14, seed, fisher=fisher)
    errors = [error(problem, fitted(problem, 4, bits, rounds=rounds).term) for rounds in (1, 2, 4)]
    assert errors[2] <= errors[1] * (1 + 1e-9) <= errors[0] * (1 + 2e-9)


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_refit_and_spreading_beat_rounding_each_factor(bits):
    """On average over problems with a falling spectrum, each of the three parts is worth something."""
    ours, plain, one_basis = [], [], []
    for seed in range(8):
        problem = well_conditioned(24, 32, seed, fisher=seed % 2 == 1)
        decay = torch.diag(0.7 ** torch.arange(24, dtype=torch.float64))
        problem = type(problem)(gaussian(24, 24, generator(seed)) @ decay @ problem.weight, problem.H, problem.G, seed)
        floats = truncated_svd(problem.weight, 8, metric=problem.metric)
        least = error(problem, floats)
        format = IntFormat(bits)
        rounded = rtn(floats.left, format).to_dense().double() @ rtn(floats.right, format).to_dense().double()
        ours.append(error(problem, fitted(problem, 8, bits).term) / least)
        plain.append(problem.metric.norm(problem.weight - rounded) / least)
        stored = quantize_factors(
            problem.weight, LowRank(floats.left, floats.right), problem.metric, FactorFormats.of(format), rounds=1
        )
        one_basis.append(error(problem, stored.term) / least)
    assert sum(ours) <= sum(one_basis) * (1 + 1e-9)
    lost, lost_plainly = (sum(e * e - 1 for e in errors) for errors in (ours, plain))
    assert lost < 0.4 * lost_plainly


@settings(max_examples=FEW)
@given(problem=problems(), bits=BITS, data=st.data())
def test_any_problem_gives_finite_factors_that_do_not_hurt(problem, bits, data):
    rank = data.draw(st.integers(1, problem.limit))
    term = fitted(problem, rank, bits).term
    assert [t.kind for t in term.terms] == ["quantized", "quantized"]
    assert (term.shape, term.terms[0].shape[1]) == (tuple(problem.weight.shape), rank)
    assert all(bool(torch.isfinite(t.double()).all()) for t in term.tensors().values())
    size = problem.metric.norm(problem.weight)
    assert error(problem, term) <= (1.0 if bits > 2 else 1.2) * size + 1e-6 * whole(problem)


@pytest.mark.parametrize("exponent", [-20, 20])
def test_powers_of_two_change_nothing_but_the_scales(exponent):
    problem = well_conditioned(8, 12, 0, fisher=True)
    scaled = type(problem)(problem.weight * 2.0**exponent, problem.H, problem.G, 0)
    a, b = (fitted(p, 3, bits=4).term for p in (problem, scaled))
    torch.testing.assert_close(dense64(b) / 2.0**exponent, dense64(a), rtol=1e-3, atol=1e-2)  # bfloat16 scales


def test_zero_gives_zero_and_metrics_without_sides_work():
    zero = LowRank(torch.zeros(4, 2), torch.zeros(2, 6))
    formats = FactorFormats.of(IntFormat(4))
    for metric in (Metric(), Metric(torch.ones(6)), Metric(torch.zeros(6, 6)), Metric(None, torch.ones(4))):
        assert not dense64(quantize_factors(torch.zeros(4, 6), zero, metric, formats).term).any()
    weight = gaussian(10, 14, generator(0))
    for metric in (Metric(), Metric(torch.rand(14, generator=generator(1)).double() + 0.1)):
        floats = truncated_svd(weight, 5, metric=metric)
        term = quantize_factors(weight, floats, metric, FactorFormats.of(IntFormat(8))).term
        assert metric.norm(weight - dense64(term)) < 1.01 * metric.norm(weight - dense64(floats))


@pytest.mark.parametrize(
    "format", [IntFormat(3), IntFormat(4, group_size=8), IntFormat(8, group_size=4, symmetric=True)]
)
def test_the_stage_stores_two_factors_and_counts_them(format):
    problem = well_conditioned(16, 24, 0, fisher=True)
    result = decompose(
        problem.weight, [QuantizeStage(IntFormat(2)), LowRankStage(5, factor_format=format)], problem.stats()
    )
    base, factors = result.operator.terms
    assert isinstance(factors, Product)
    left, right = factors.terms
    assert isinstance(left, Quantized)
    assert (left.format, right.format) == (FactorFormats.of(format).left, format)
    assert factors.storage_bits == FactorFormats.of(format).stored_bits((16, 24), 5)
    report = result.report
    assert (report.rank, report.bits, report.storage_bits) == (5, 2, base.storage_bits + factors.storage_bits)
    tail = float(oracle_sigma(problem.weight - dense64(base), problem.H, None)[5:].norm())
    assert report.lower_bound == pytest.approx(tail / Metric(problem.H).norm(problem.weight), rel=1e-6)
    assert report.guaranteed_error is None
    assert report.damping == 0.01


@settings(max_examples=FEW)
@given(
    m=st.integers(1, 16), n=st.sampled_from([4, 8, 16]), value=st.floats(2.5, 20), bits=BITS, symmetric=st.booleans()
)
def test_bits_per_weight_counts_quantized_factors(m, n, value, bits, symmetric):
    weight = gaussian(m, n, generator(0))
    formats = FactorFormats(IntFormat(bits, None, symmetric), IntFormat(bits, 4, symmetric))
    report = decompose(weight, [LowRankStage(BitsPerWeight(value), factor_format=formats)]).report
    assert report.bits_per_weight <= value
    assert report.rank == min(m, n) or formats.stored_bits((m, n), report.rank + 1) / (m * n) > value


def test_only_ranks_that_can_be_stored_are_tried():
    weight = gaussian(16, 16, generator(0))
    formats = FactorFormats(IntFormat(4, group_size=4), IntFormat(4))
    report = decompose(weight, [LowRankStage(BitsPerWeight(5.6), factor_format=formats)]).report
    assert report.rank == 4
    assert formats.stored_bits((16, 16), 4) / 256 <= 5.6 < formats.stored_bits((16, 16), 8) / 256
    assert decompose(weight, [LowRankStage(RelativeError(0.9), factor_format=formats)]).report.rank % 4 == 0


@settings(max_examples=FEW)
@given(seed=st.integers(0, 99), value=st.floats(0.1, 0.99), bits=st.sampled_from([4, 8]))
def test_relative_error_is_met_as_stored(seed, value, bits):
    problem = well_conditioned(12, 16, seed, fisher=True)
    stage = LowRankStage(RelativeError(value), factor_format=IntFormat(bits))
    try:
        term = decompose(problem.weight, [stage], problem.stats()).operator
    except BudgetError:
        assert bits == 4
        assert value < 0.3
        return
    size = problem.metric.norm(problem.weight)
    assert error(problem, term) <= value * size * (1 + 1e-12)
    rank = term.rank if isinstance(term, LowRank) else term.terms[0].shape[1]
    tails = oracle_sigma(problem.weight, problem.H, problem.G)
    assert rank <= 12
    assert rank == 0 or float(tails[rank - 1 :].norm()) > 0.6 * value * size  # not many ranks too many


def test_the_quantizer_is_given_the_moments_of_both_sides(monkeypatch):
    problem = well_conditioned(8, 12, 0, fisher=True)
    seen = []

    def run(weight, stats, format):
        stats.check_weight(weight)
        seen.append((weight, stats))
        return QuantizerResult(rtn(weight, format))

    monkeypatch.setitem(QUANTIZERS, "spy", QuantizerEntry("", "", run))
    stage = LowRankStage(3, factor_format=IntFormat(8), factor_method="spy")
    decompose(problem.weight, [stage], problem.stats())
    (first, inner), (_, outer) = seen[:2]
    torch.testing.assert_close(inner.hessian, problem.H)
    torch.testing.assert_close(outer.gradient.second, problem.G)
    known = rtn(first, IntFormat(8)).to_dense().double()
    torch.testing.assert_close(outer.hessian, known @ problem.H @ known.T)
    floats = truncated_svd(problem.weight, 3, metric=problem.metric)
    spread_left = spread([floats.left], floats.right, [problem.metric])[0][0]
    torch.testing.assert_close(inner.gradient.second, spread_left.T @ problem.G @ spread_left)
    with pytest.raises(RecipeError, match=r"method='magic' is unknown"):
        LowRankStage(3, factor_format=IntFormat(8), factor_method="magic")


@pytest.mark.parametrize("name", ["int6", "nf4", "nvfp4", "fp8_e4m3", "fp8_e4m3_tensor", "fp8_e4m3_block"])
def test_factors_in_other_formats(name):
    problem = well_conditioned(32, 64, 0, fisher=True)
    format = number_format(name)
    result = decompose(problem.weight, [LowRankStage(8, factor_format=format)], problem.stats())
    floats = decompose(problem.weight, [LowRankStage(8)], problem.stats()).report
    assert result.operator.storage_bits == FactorFormats.of(format).stored_bits((32, 64), 8)
    assert floats.predicted_nats <= result.report.predicted_nats < 1.1 * floats.predicted_nats


def test_rank_zero_stores_nothing():
    report = decompose(torch.ones(3, 5), [LowRankStage(0, factor_format=IntFormat(4))]).report
    assert (report.rank, report.storage_bits) == (0, 0)


def test_bad_input():
    weight = gaussian(8, 12, generator(0))
    with pytest.raises(FormatError, match=r"group_size=5 does not divide in_features=12"):
        decompose(weight, [LowRankStage(2, factor_format=IntFormat(4, group_size=5))])
    with pytest.raises(FormatError, match=r"group_size=4 does not divide in_features=3"):
        decompose(weight, [LowRankStage(3, factor_format=FactorFormats(IntFormat(4, 4), IntFormat(4)))])
    with pytest.raises(RankError, match=r"^LowRankStage\(rank=9\) is outside"):
        decompose(weight, [LowRankStage(Rank(9), factor_format=IntFormat(4))])
    with pytest.raises(BudgetError, match=r"RelativeError\(0.001\) cannot be met with these factor formats; .* found"):
        decompose(weight, [LowRankStage(RelativeError(0.001), factor_format=IntFormat(2))])
    with pytest.raises(BudgetError, match=r"already store 384"):
        decompose(weight, [QuantizeStage(IntFormat(2), method="rtn"),
                           LowRankStage(BitsPerWeight(2), factor_format=IntFormat(2))])  # fmt: skip
