import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies_matrices import (
    brute_squared_norm,
    gaussian,
    generator,
    problems,
    psd,
    whole,
)  # fmt: skip

from tnc.errors import StatsError
from tnc.metric import Metric, root
from tnc.stats import LayerStats, Moments


def constructors(stats: LayerStats):
    """Every metric with its H and G written out densely."""
    n = stats.inputs.features
    H, mean_abs = stats.hessian, stats.inputs.mean_abs
    eye = torch.eye(n, dtype=torch.float64)
    yield Metric(), eye, None
    yield Metric.identity(stats), eye, None
    yield Metric.rms(stats), torch.diag(H.diagonal()), None
    yield Metric.mean_abs(stats), torch.diag(mean_abs * mean_abs), None
    yield Metric.mean_abs(stats, alpha=0.5), torch.diag(mean_abs), None
    yield Metric.full(stats), H, None
    if stats.gradient is not None:
        G = stats.gradient.second
        yield Metric.fisher(stats), H, G
        yield Metric.auto(stats), H, G
        yield Metric(None, G.diagonal()), eye, torch.diag(G.diagonal())
    else:
        yield Metric.auto(stats), H, None


@given(problem=problems())
def test_every_constructor_is_the_brute_force_trace(problem):
    for metric, H, G in constructors(problem.stats()):
        expected = brute_squared_norm(problem.weight, H, G)
        scale = float(problem.weight.norm() ** 2 * H.norm() * (1 if G is None else G.norm()))
        assert abs(metric.squared_norm(problem.weight) - expected) <= 1e-12 * scale
        rounding = {"rel": 1e-12, "abs": 1e-12 * scale}  # sums may be taken in another order from call to call
        assert metric.norm(problem.weight) ** 2 == pytest.approx(expected, **rounding)
        if G is not None:
            assert 2 * metric.nats(problem.weight) == pytest.approx(expected, **rounding)


@given(problem=problems(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_narrow_errors_are_priced_in_float32(problem, dtype):
    error = (problem.weight / max(float(problem.weight.abs().max()), 1e-300)).to(dtype)
    found = problem.metric.squared_norm(error)
    scale = (
        float(error.double().norm()) ** 2
        * float(problem.H.norm())
        * (1 if problem.G is None else float(problem.G.norm()))
    )
    # three roundings of float32 products over at most 13 terms
    assert abs(found - brute_squared_norm(error, problem.H, problem.G)) <= 1e-5 * scale


@given(problem=problems())
def test_norm_is_unchanged_by_rotation(problem):
    m, n = problem.weight.shape
    g = generator(problem.seed)
    Q, P = (torch.linalg.qr(gaussian(k, k, g)).Q for k in (n, m))
    turned = Metric(Q.T @ problem.H @ Q, None if problem.G is None else P.T @ problem.G @ P)
    E = P.T @ problem.weight @ Q
    tolerance = 1e-12 * whole(problem) ** 2
    assert abs(turned.squared_norm(E) - problem.metric.squared_norm(problem.weight)) <= tolerance


@given(problem=problems(), factor=st.sampled_from([-2.0, 0.5]))
def test_norm_is_a_seminorm(problem, factor):
    a = problem.weight
    b = float(a.norm()) * gaussian(*a.shape, generator(problem.seed))
    norm, slack = problem.metric.norm, 1e-6 * whole(problem)  # a square root turns 1e-13 into 3e-7
    assert norm(a) >= 0
    assert abs(norm(factor * a) - abs(factor) * norm(a)) <= slack
    assert norm(a + b) <= norm(a) + norm(b) + 10 * slack


def test_by_hand():
    error = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    H = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    metric = Metric(H, torch.tensor([[10.0]], dtype=torch.float64))
    assert metric.squared_norm(error) == 10 * (2 + 2 * 2 * 1 + 4 * 3)
    assert metric.nats(error) == 90
    assert metric.relative(error, 2 * error) == 0.5
    assert Metric(torch.tensor([1.0, 0.25])).squared_norm(error) == 2


def test_relative_where_the_weight_vanishes():
    metric = Metric(torch.tensor([1.0, 0.0]))
    seen, unseen = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert metric.relative(unseen, unseen) == 0
    assert metric.relative(seen, unseen) == float("inf")


@given(problem=problems())
def test_one_sided_products(problem):
    metric, W = problem.metric, problem.weight
    torch.testing.assert_close(metric.times_hessian(W), W @ problem.H)
    torch.testing.assert_close(metric.times_gradient(W), W if problem.G is None else problem.G @ W)
    diagonal = Metric(problem.H.diagonal(), None)
    torch.testing.assert_close(diagonal.times_hessian(W), W @ torch.diag(problem.H.diagonal()))
    assert metric.times_hessian(W.float()).dtype == torch.float32


@given(size=st.integers(1, 12), rank=st.integers(0, 12), seed=st.integers(0, 99))
def test_root_squares_back(size, rank, seed):
    side = psd(size, rank, 1.0, generator(seed))
    S = root(side)
    torch.testing.assert_close(S @ S.T, side, rtol=0, atol=1e-12 * max(1.0, float(side.norm())))
    torch.testing.assert_close(root(side.diagonal()) ** 2, side.diagonal())
    assert root(None) is None


def test_root_cuts_negative_rounding():
    assert torch.isfinite(root(torch.diag(torch.tensor([1.0, -1e-17]).double()))).all()
    assert torch.isfinite(root(torch.tensor([1.0, -1e-17]).double())).all()


def test_inputs_are_not_changed():
    H, error = torch.eye(2).double(), torch.ones(1, 2)
    metric = Metric(H)
    metric.squared_norm(error)
    metric.to(torch.float32)
    assert torch.equal(H, torch.eye(2).double())
    assert torch.equal(error, torch.ones(1, 2))
    assert metric.to(torch.float32).hessian.dtype == torch.float32
    assert metric.hessian.dtype == torch.float64


def test_nats_need_gradients():
    stats = LayerStats.from_hessian(torch.eye(2), tokens=1)
    with pytest.raises(StatsError, match=r"without the gradient moment G has no price in nats; use Metric\.fisher"):
        Metric.full(stats).nats(torch.ones(1, 2))
    with pytest.raises(StatsError, match=r"no gradient moment G; calibrate with fisher=True, or use Metric\.full"):
        Metric.fisher(stats)


def test_mean_abs_needs_activations():
    stats = LayerStats(Moments(torch.eye(2).double(), None, 1))
    with pytest.raises(StatsError, match=r"no mean of \|x\|.*use Metric\.rms"):
        Metric.mean_abs(stats)
