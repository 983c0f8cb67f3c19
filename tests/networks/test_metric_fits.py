"""Kronecker whitening, alternating least squares and rank adaptation in the full metric, against dense oracles."""

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import BudgetError, ShapeError, StatsError
from tnc.metric import Metric
from tnc.networks import KroneckerMetric, adapt_ranks, als, nearest_kronecker, tt_svd, tt_svd_with_report
from tnc.networks import local as local_module
from tnc.networks.als import layer_of, local_problem
from tnc.networks.canonical import mixed_canonical
from tnc.terms import dense64
from tnc.testing import make_hessian, make_problem, mpos, weighted_problems
from tnc.testing.mpo_laws import mode_lists

SLOW = settings(max_examples=max(settings.default.max_examples // 4, 10))


def moment(size, seed, tokens=None):
    x = torch.randn(tokens or 2 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


@st.composite
def fits(draw, dtypes=(torch.float64,)):
    """A weighted problem with modes and a bond dimension."""
    problem = draw(weighted_problems(dtypes=dtypes, scales=(1.0, 1e-3, 1e3)))
    d = draw(st.integers(1, 3))
    modes = draw(mode_lists(problem.weight.shape[0], d)), draw(mode_lists(problem.weight.shape[1], d))
    return problem, modes, draw(st.integers(1, 4))


@pytest.mark.parametrize("modes", [(3, 4), (2, 2, 3), (12,)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_kronecker_product_is_found_again(modes, diagonal):
    factors = [moment(mode, k) for k, mode in enumerate(modes)]
    side = reduce(torch.kron, factors)
    found = nearest_kronecker(side.diagonal() if diagonal else side, 12, modes)
    expected = torch.diag(side.diagonal()) if diagonal else side
    torch.testing.assert_close(reduce(torch.kron, found), expected)


@given(
    seed=st.integers(0, 99), kind=st.sampled_from(("full", "deficient", "ill_conditioned", "dead_column", "diagonal"))
)
def test_no_kronecker_product_of_two_is_nearer(seed, kind):
    """For two modes the distance is that of the best rank-one matrix of the rearrangement, by a dense SVD."""
    side = make_hessian(12, kind=kind, seed=seed)
    found = reduce(torch.kron, nearest_kronecker(side, 12, (3, 4)))
    rearranged = side.reshape(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16)
    best = float(torch.linalg.svdvals(rearranged)[1:].norm())
    assert float((side - found).norm()) <= best * (1 + 1e-6) + 1e-12 * float(side.norm())


@given(seed=st.integers(0, 99), n=st.sampled_from((11, 12)), modes=st.sampled_from(((3, 4), (2, 2, 3), (4, 3))))
def test_factors_stay_semidefinite(seed, n, modes):
    for factor in nearest_kronecker(moment(n, seed, tokens=5), n, modes):
        assert torch.equal(factor, factor.T)
        assert float(torch.linalg.eigvalsh(factor)[0]) >= -1e-12 * float(factor.norm())


def test_a_side_of_zeros_or_none_sees_all_directions_alike():
    for side in (None, torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)):
        assert all(torch.equal(f, torch.eye(len(f), dtype=torch.float64)) for f in nearest_kronecker(side, 6, (2, 3)))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_in_a_kronecker_metric_two_sites_are_optimal(rank):
    """Whitened unfolding: no operator of this bond dimension is closer in ``G ⊗ H``."""
    outs, ins = (3, 4), (4, 2)
    G = [moment(o, k) for k, o in enumerate(outs)]
    H = [moment(i, 9 + k) for k, i in enumerate(ins)]
    metric = Metric(reduce(torch.kron, H), reduce(torch.kron, G))
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = tt_svd_with_report(weight, outs, ins, max_rank=rank, metric=metric)
    sites = weight.reshape(3, 4, 4, 2).permute(0, 2, 1, 3).reshape(12, 8)
    roots = [torch.linalg.cholesky(torch.kron(G[k], H[k])) for k in range(2)]
    tail = float(torch.linalg.svdvals(roots[0].T @ sites @ roots[1])[rank:].norm())
    error = metric.norm(weight - dense64(fit.mpo))
    assert error == pytest.approx(tail, rel=1e-7)
    assert fit.error == pytest.approx(error / metric.norm(weight), rel=1e-7)
    assert error <= metric.norm(weight - dense64(tt_svd(weight, outs, ins, max_rank=rank)))
    refined = als(weight, fit.mpo, metric=metric)
    assert refined.errors[-1] == pytest.approx(fit.error, rel=1e-6)


@given(fit=fits())
@SLOW
def test_whitening_is_undone(fit):
    problem, (outs, ins), _ = fit
    if problem.stats.hessian.count_nonzero() == 0:
        return
    shape = (problem.weight.shape[0], problem.weight.shape[1])
    white = KroneckerMetric.nearest(Metric(moment(shape[1], 3)), torch.zeros(shape), outs, ins)
    mpo = tt_svd(problem.weight, outs, ins)
    back = white.unwhitened(white.on_cores(mpo))
    if not mpo.padded:
        torch.testing.assert_close(
            dense64(back), problem.weight, rtol=1e-5, atol=1e-5 * float(problem.weight.abs().max())
        )


@given(fit=fits())
@SLOW
def test_als_never_raises_the_error(fit):
    problem, (outs, ins), rank = fit
    start = tt_svd(problem.weight, outs, ins, max_rank=rank)
    found = als(problem.weight, start, metric=problem.metric, sweeps=2)
    allowed = 1e-6 + 1e-9 / max(problem.metric.norm(problem.weight), 1e-300) * problem.scale
    assert all(later <= earlier + allowed for earlier, later in zip(found.errors, found.errors[1:], strict=False))
    given_error = problem.metric.relative(problem.weight - dense64(start), problem.weight)
    error = problem.metric.relative(problem.weight - dense64(found.mpo), problem.weight)
    assert error <= given_error + allowed
    assert found.mpo.ranks == start.ranks
    assert found.mpo.shape == start.shape


@given(a=mpos(), seed=st.integers(0, 99), gradient=st.booleans(), data=st.data())
@SLOW
def test_a_local_solution_is_the_least_squares_solution(a, seed, gradient, data):
    """The normal equations by brute force: every unit core expanded, whitened, and solved for by lstsq."""
    m, n = a.shape
    metric = Metric(moment(n, seed), moment(m, seed + 1) if gradient else None)
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = data.draw(st.integers(0, len(a.cores) - 1))
    cores = list(mixed_canonical(a, k).cores)
    local = local_problem(layer_of(weight, a, None, metric), cores, k, 1)
    found = local.solve(cores[k].reshape(local.sizes))
    count = found.numel()
    roots = (
        torch.linalg.cholesky(metric.hessian),
        torch.eye(m).double() if not gradient else torch.linalg.cholesky(metric.gradient),
    )
    columns = [local.expand(unit.reshape(local.sizes)) for unit in torch.eye(count, dtype=torch.float64)]
    design = torch.stack([(roots[1].T @ column @ roots[0]).flatten() for column in columns], dim=1)
    target = (roots[1].T @ weight @ roots[0]).flatten()
    best = float(
        (target - design @ torch.linalg.lstsq(design, target.unsqueeze(1), driver="gelsd").solution[:, 0]).norm()
    )
    size = float(target.norm())
    assert local.error(found) ** 0.5 <= best + 2e-4 * size
    assert local.error(found) ** 0.5 >= best - 1e-6 * size
    core = torch.randn(local.sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float((local.project(weight) * core).sum()) == pytest.approx(
        float((local.expand(core) * weight).sum()), abs=1e-9
    )
    assert local.error(core) == pytest.approx(metric.squared_norm(weight - local.expand(core)), rel=1e-9)


def test_both_local_solvers_agree(monkeypatch):
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = Metric(moment(12, 5))
    start = tt_svd(weight, (2, 2, 3), (3, 2, 2), max_rank=3)
    direct = als(weight, start, metric=metric, sweeps=4)
    monkeypatch.setattr(local_module, "DIRECT_LIMIT", 0)
    iterated = als(weight, start, metric=metric, sweeps=4)
    assert direct.errors[-1] == pytest.approx(iterated.errors[-1], rel=1e-4)


def test_als_beats_whitening_where_the_metric_is_no_kronecker_product():
    problem = make_problem((24, 24), hessian="full", gradient="full", metric="fisher", dtype=torch.float64, seed=4)
    start = tt_svd(problem.weight, (4, 6), (6, 4), max_rank=6, metric=problem.metric)
    found = als(problem.weight, start, metric=problem.metric, sweeps=3)
    assert found.errors[-1] < 0.9 * found.errors[0]


@given(fit=fits(dtypes=(torch.float64, torch.float32)), eps=st.sampled_from((0.5, 0.2, 0.05)))
@SLOW
def test_adapted_ranks_keep_the_tolerance_as_stored(fit, eps):
    problem, (outs, ins), _ = fit
    start = tt_svd(problem.weight, outs, ins)
    found = adapt_ranks(problem.weight, start, eps=eps, metric=problem.metric, sweeps=1)
    assert problem.metric.relative(problem.weight.double() - dense64(found), problem.weight.double()) <= eps * (
        1 + 1e-9
    )
    assert found.params <= start.params


def test_bonds_grow_where_the_start_is_too_small():
    problem = make_problem((24, 24), hessian="full", gradient="full", metric="fisher", dtype=torch.float64, seed=4)
    start = tt_svd(problem.weight, (2, 3, 4), (4, 3, 2), max_rank=1)
    found = adapt_ranks(problem.weight, start, eps=0.3, metric=problem.metric, sweeps=3)
    assert max(found.ranks) > 1
    assert problem.metric.relative(problem.weight - dense64(found), problem.weight) <= 0.3
    by_whitening = tt_svd(problem.weight, (2, 3, 4), (4, 3, 2), eps=0.3, metric=problem.metric)
    assert found.params <= by_whitening.params


def test_what_is_missing_is_named():
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    start = tt_svd(weight, (2, 3), (2, 3), max_rank=1)
    with pytest.raises(StatsError, match="metric"):
        als(weight, start)
    with pytest.raises(ShapeError, match="mpo"):
        als(torch.ones(5, 6), start, metric=Metric())
    with pytest.raises(BudgetError, match="sweeps"):
        als(weight, start, metric=Metric(), sweeps=0)
    with pytest.raises(BudgetError, match="sweeps"):
        adapt_ranks(weight, start, eps=0.1, metric=Metric(), sweeps=0)
    with pytest.raises(BudgetError, match="reached a relative error"):
        adapt_ranks(weight, start, eps=0.01, metric=Metric(), max_rank=1)
