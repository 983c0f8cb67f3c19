"""`truncated_svd` and `compensate`: optimal, never worse than nothing, met as stored."""

import itertools

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
    sym_root,
    well_conditioned,
    whole,
)  # fmt: skip

from tnc.column_space import Exact, Subspace
from tnc.decompose import BitsPerWeight, LowRankStage, Rank, RelativeError, compensate, decompose, truncated_svd
from tnc.errors import BudgetError, NonFiniteError, RankError, ShapeError, StatsError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.quant import rtn
from tnc.stats import LayerStats, Moments
from tnc.terms import Dense, Sum, dense64


@given(problem=problems(), data=st.data())
def test_error_is_the_tail_and_falls_with_rank(problem, data):
    rank = data.draw(st.integers(0, problem.limit))
    sigma = oracle_sigma(problem.weight, problem.H, problem.G)
    errors = [problem.metric.norm(problem.weight - dense64(truncated_svd(problem.weight, k, metric=problem.metric)))
              for k in range(rank + 1)]  # fmt: skip
    slack = 1e-6 * whole(problem)
    assert errors[rank] == pytest.approx(float(sigma[rank:].norm()), abs=slack, rel=1e-6)
    assert all(b <= a + slack for a, b in itertools.pairwise(errors))


@given(problem=problems(), base_error=st.sampled_from([0.0, 0.1, 2.0]), data=st.data())
def test_compensation_is_the_optimum_of_the_residual(problem, base_error, data):
    rank = data.draw(st.integers(0, problem.limit))
    noise = gaussian(*problem.weight.shape, generator(problem.seed))
    base = Dense(problem.weight + base_error * float(problem.weight.abs().max()) * noise)
    term = compensate(problem.weight, base, rank, stats=problem.stats())
    before = problem.metric.norm(problem.weight - base.matrix)
    after = problem.metric.norm(problem.weight - dense64(Sum((base, term))))
    best = float(oracle_sigma(problem.weight - base.matrix, problem.H, problem.G)[rank:].norm())
    slack = 1e-6 * (before + whole(problem))
    assert abs(after - best) <= slack
    assert after <= before + slack
    assert (term.shape, term.rank) == (tuple(problem.weight.shape), rank)


@given(problem=problems(scales=st.sampled_from([1e-2, 1.0, 1e2])), data=st.data(),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))  # fmt: skip
def test_dtype_shape_and_weight_are_kept(problem, data, dtype):
    weight = problem.weight.to(dtype)
    copy, rank = weight.clone(), data.draw(st.integers(0, problem.limit))
    for solver in (Exact(), Subspace(), None):
        term = truncated_svd(weight, rank, metric=problem.metric, solver=solver)
        assert term.left.dtype == term.right.dtype == dtype
        assert term.rank == rank
        assert {term.left.data_ptr(), term.right.data_ptr()}.isdisjoint({weight.data_ptr()} if rank else set())
        left, right = term.left.double().norm(dim=0), term.right.double().norm(dim=1)
        torch.testing.assert_close(left, right, rtol=1e-2, atol=0)
    assert torch.equal(weight, copy)
    assert truncated_svd(weight, rank, dtype=torch.float32).left.dtype == torch.float32


@given(m=st.integers(2, 24), n=st.integers(2, 24), seed=st.integers(0, 99), fisher=st.booleans(),
       value=st.floats(0.01, 0.99), dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))  # fmt: skip
def test_relative_error_is_met_as_stored_by_the_smallest_rank(m, n, seed, fisher, value, dtype):
    problem = well_conditioned(m, n, seed, fisher=fisher)
    weight = problem.weight.to(dtype)
    size = brute_squared_norm(weight, problem.H, problem.G) ** 0.5
    try:
        term = truncated_svd(weight, RelativeError(value), metric=problem.metric)
    except BudgetError:
        assert dtype == torch.bfloat16  # 8 bits of precision: up to about 1 % is out of reach
        assert value < 0.05
        return

    def error(k):
        return brute_squared_norm(weight.double() - dense64(truncated_svd(weight, k, metric=problem.metric)),
                                  problem.H, problem.G) ** 0.5  # fmt: skip

    assert error(term.rank) <= value * size * (1 + 1e-12)
    assert term.rank == 0 or error(term.rank - 1) > value * size * (1 - 1e-9)


def test_relative_error_counts_the_weight_not_the_residual():
    problem = well_conditioned(12, 16, 0)
    base = rtn(problem.weight, IntFormat(3))
    term = compensate(problem.weight, base, RelativeError(0.1), stats=problem.stats())
    assert problem.metric.relative(problem.weight - dense64(Sum((base, term))), problem.weight) <= 0.1
    assert compensate(problem.weight, base, RelativeError(0.99), stats=problem.stats()).rank == 0


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    value=st.floats(0.01, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_bits_per_weight_is_never_exceeded_and_used_up(m, n, value, dtype):
    weight = gaussian(m, n, generator(0)).to(dtype)
    term = truncated_svd(weight, BitsPerWeight(value))
    assert term.storage_bits / weight.numel() <= value
    more = term.storage_bits + (m + n) * dtype.itemsize * 8
    assert term.rank == min(m, n) or more / weight.numel() > value


@given(m=st.integers(1, 60), n=st.integers(1, 60), data=st.data())
def test_reported_bits_per_weight_buy_the_same_rank_again(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    weight = torch.ones(m, n, dtype=torch.bfloat16)
    used = decompose(weight, [LowRankStage(Rank(rank, forced=True))]).report.bits_per_weight
    assert truncated_svd(weight, BitsPerWeight(used)).rank == rank


def test_bits_per_weight_counts_the_base():
    problem = well_conditioned(16, 32, 0)
    weight = problem.weight.bfloat16()
    base = rtn(weight, IntFormat(3, group_size=16))
    term = compensate(weight, base, BitsPerWeight(8), stats=problem.stats())
    assert (base.storage_bits + term.storage_bits) / weight.numel() <= 8
    assert term.rank == (8 * 512 - base.storage_bits) // (48 * 16)
    with pytest.raises(BudgetError, match=r"allows 512 bits for weight \(16, 32\), but the other terms already store"):
        compensate(weight, base, BitsPerWeight(1), stats=problem.stats())


def qera(D, H, k):
    """QERA-exact, arXiv:2410.06040 theorem 1: ``R^½`` the symmetric root; SVD of ``D R^½``; un-whiten."""
    root = sym_root(H)
    U, s, Vh = torch.linalg.svd(D @ root)
    return U[:, :k] * s[:k] @ Vh[:k] @ torch.linalg.inv(root)


def eora(D, H, k):
    """EoRA, arXiv:2410.21271 algorithm 1: project on the eigenvectors of XXᵀ scaled by root eigenvalues."""
    values, Q = torch.linalg.eigh(H)
    scaled = Q * values.sqrt()
    U, s, Vh = torch.linalg.svd(D @ scaled)
    return U[:, :k] * s[:k] @ Vh[:k] @ torch.linalg.inv(scaled)


def svd_llm(D, H, k):
    """SVD-LLM, arXiv:2403.07378 section 3.1: whitening by the Cholesky factor of XXᵀ."""
    S = torch.linalg.cholesky(H)
    U, s, Vh = torch.linalg.svd(D @ S)
    return U[:, :k] * s[:k] @ Vh[:k] @ torch.linalg.inv(S)


def cloq(D, H, k):
    """CLoQ, arXiv:2501.18475 theorem 3.1: ``R = Σ^½ Uᵀ`` from the SVD of the Gram matrix, LR of ``R Dᵀ``."""
    U, s, _ = torch.linalg.svd(H)
    R = s.sqrt().unsqueeze(1) * U.T
    left, sigma, Vh = torch.linalg.svd(R @ D.T)
    return (torch.linalg.inv(R) @ left[:, :k] * sigma[:k] @ Vh[:k]).T


@pytest.mark.parametrize("textbook", [qera, eora, svd_llm, cloq])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_published_formulas_are_this_one_optimum(textbook, shape):
    problem = well_conditioned(*shape, 4)
    base = rtn(problem.weight, IntFormat(3))
    residual = problem.weight - dense64(base)
    expected = textbook(residual, problem.H, 5)
    found = dense64(compensate(problem.weight, base, 5, metric=Metric.full(problem.stats())))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_diagonal_metrics_are_scaled_svds(shape):
    """QERA-approx (RMS) and L²QER / ASVD (mean |x|): SVD of ``D diag(s)``, un-scaled."""
    problem = well_conditioned(*shape, 5)
    stats = LayerStats(Moments(problem.H, torch.rand(shape[1], generator=generator(1)).double() + 0.1, 9))
    for metric, s in (
        (Metric.rms(stats), problem.H.diagonal().sqrt()),
        (Metric.mean_abs(stats), stats.inputs.mean_abs),
    ):
        U, sigma, Vh = torch.linalg.svd(problem.weight * s)
        expected = U[:, :4] * sigma[:4] @ Vh[:4] / s
        torch.testing.assert_close(dense64(truncated_svd(problem.weight, 4, metric=metric)), expected)


def test_by_hand():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    plain = truncated_svd(weight, 1).to_dense()
    torch.testing.assert_close(plain, torch.diag(torch.tensor([3.0, 0, 0])))
    seen = truncated_svd(weight, 1, metric=Metric(torch.tensor([0.0, 1.0, 100.0]))).to_dense()
    torch.testing.assert_close(seen, torch.diag(torch.tensor([0, 0, 1.0])))


def test_rank_beyond_the_spectrum_is_padded_with_zeros():
    term = truncated_svd(torch.ones(4, 3), 3)
    assert term.rank == 3
    torch.testing.assert_close(term.to_dense(), torch.ones(4, 3))
    assert not truncated_svd(torch.zeros(4, 3), 2).to_dense().any()


@pytest.mark.parametrize("rank", [-1, 4, 2.5, True, Rank(4)])
def test_rank_out_of_range(rank):
    value = rank.value if isinstance(rank, Rank) else rank
    message = rf"\(rank={value}\) is outside 0 <= rank <= min\(weight\.shape\) = 3 for weight \(3, 5\); "
    message += "use an integer rank <= 3"
    with pytest.raises(RankError, match=r"^truncated_svd" + message):
        truncated_svd(torch.ones(3, 5), rank)
    with pytest.raises(RankError, match=r"^compensate" + message):
        compensate(torch.ones(3, 5), Dense(torch.ones(3, 5)), rank, metric=Metric())
    with pytest.raises(RankError, match=r"^LowRankStage" + message):
        decompose(torch.ones(3, 5), [LowRankStage(rank)])


def test_unreachable_error_says_what_is_reachable():
    weight = gaussian(20, 20, generator(0)).bfloat16()
    with pytest.raises(
        BudgetError, match=r"RelativeError\(0\.0001\) cannot be met.*torch\.bfloat16.*relative error is \d\.\d{3}e-03"
    ):
        truncated_svd(weight, RelativeError(1e-4))
    with pytest.raises(BudgetError, match=r"RelativeError\(0\) cannot be met.*relative error is \d\.\d{3}e-03"):
        truncated_svd(1000 * weight, RelativeError(0))
    hidden = Metric(torch.diag(torch.tensor([1.0, 0.0])))  # the base errs where the metric sees no weight
    with pytest.raises(BudgetError, match=r"relative error is inf"):
        compensate(torch.eye(2)[1:].bfloat16() / 3, Dense(torch.ones(1, 2) / 3), RelativeError(0.5), metric=hidden)


@pytest.mark.parametrize("value", [-0.1, 1, float("nan")])
def test_relative_error_range(value):
    with pytest.raises(BudgetError, match=rf"RelativeError\({value}\) is outside \[0, 1\)"):
        RelativeError(value)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_bits_per_weight_range(value):
    with pytest.raises(BudgetError, match=rf"BitsPerWeight\({value}\) must be positive"):
        BitsPerWeight(value)


def test_other_bad_inputs():
    weight, base = torch.ones(3, 5), Dense(torch.ones(3, 5))
    with pytest.raises(ShapeError, match=r"base has shape \(5, 3\); expected \(3, 5\) from weight"):
        compensate(weight, Dense(torch.ones(5, 3)), 1, metric=Metric())
    with pytest.raises(StatsError, match=r"needs calibration statistics or a metric; pass stats=\.\.\., or metric"):
        compensate(weight, base, 1)
    with pytest.raises(StatsError, match=r"in_features=4"):
        compensate(weight, base, 1, stats=LayerStats.from_hessian(torch.eye(4), tokens=1))
    bad = weight.clone()
    bad[1, 2] = float("nan")
    for call in (lambda: truncated_svd(bad, 1), lambda: compensate(bad, base, 1, metric=Metric())):
        with pytest.raises(
            NonFiniteError, match=r"weight holds 1 NaN or Inf of 15 entries, the first at index \(1, 2\)"
        ):
            call()
    with pytest.raises(ShapeError, match=r"expected a floating-point matrix"):
        truncated_svd(torch.ones(5), 1)
