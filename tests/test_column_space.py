import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies_matrices import (
    Problem,
    gaussian,
    generator,
    oracle_sigma,
    problems,
    psd,
    whole,
)  # fmt: skip

from tnc.column_space import Exact, Subspace, choose_solver, column_space, spectrum
from tnc.metric import Metric


def product(space):
    return space.left.double() @ space.right.double()


def optimum(problem, rank):
    return float(oracle_sigma(problem.weight, problem.H, problem.G)[rank:].norm())


@given(problem=problems())
def test_spectrum_is_that_of_the_whitened_matrix(problem):
    found = spectrum(problem.weight, problem.metric)
    expected = oracle_sigma(problem.weight, problem.H, problem.G)
    assert found.shape == (problem.limit,)
    assert (found.diff() <= 0).all()
    # eigenvalues of a Gram matrix: an absolute error of eps in the square, 1e-7 in the root
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=3e-7 * whole(problem))


@given(problem=problems(), data=st.data())
def test_exact_attains_the_optimum(problem, data):
    rank = data.draw(st.integers(0, problem.limit))
    space = column_space(problem.weight, rank, problem.metric, Exact())
    error = problem.metric.norm(problem.weight - product(space))
    assert abs(error - optimum(problem, rank)) <= 1e-6 * whole(problem)
    assert len(space.captured) <= rank
    total = problem.metric.squared_norm(problem.weight)
    assert abs(total - float(space.captured.sum()) - optimum(problem, rank) ** 2) <= 1e-11 * whole(problem) ** 2


@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 999), fisher=st.booleans(), data=st.data())
def test_exact_attains_the_optimum_to_1e_6_of_itself(m, n, seed, fisher, data):
    """Dense spectra with singular G and H: fewer tokens than features."""
    g = generator(seed)
    G = psd(m, (m + 1) // 2, 1.0, g) if fisher else None
    problem = Problem(gaussian(m, n, g), psd(n, (n + 1) // 2, 1.0, g), G, seed)
    rank = data.draw(st.integers(0, problem.limit))
    best = optimum(problem, rank)
    scale = optimum(problem, 0)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        space = column_space(problem.weight.to(dtype), rank, problem.metric, Exact())
        error = problem.metric.norm(problem.weight - product(space))
        # where the rank reaches that of the whitened matrix, the optimum is 0 and rounding is what remains
        assert best - 1e-6 * scale <= error <= best * (1 + tolerance) + 1e-6 * scale


@given(problem=problems(), data=st.data(), solver=st.sampled_from([Exact(), Subspace(2, 4)]))
def test_left_is_orthonormal_in_the_gradient_metric(problem, data, solver):
    rank = data.draw(st.integers(0, problem.limit))
    space = column_space(problem.weight, rank, problem.metric, solver)
    sigma = oracle_sigma(problem.weight, problem.H, problem.G)
    # directions below 1e-4 of the largest singular value are 1e-8 in the Gram matrix and lose orthogonality
    clear = space.captured > 1e-7 * (float(sigma[0]) ** 2 if len(sigma) else 0)
    Z = space.left[:, clear].double()
    gram = Z.T @ problem.metric.times_gradient(Z)
    noise = whole(problem) ** 2 / float(space.captured[clear].min()) if bool(clear.any()) else 0.0
    if noise < 1e8:
        torch.testing.assert_close(gram, torch.eye(Z.shape[1]).double(), rtol=0, atol=1e-6)
        expected = Z.T @ problem.metric.times_gradient(problem.weight)
        torch.testing.assert_close(space.right[clear].double(), expected, rtol=1e-5, atol=1e-6 * float(expected.norm()))
    assert (space.captured.diff() <= 0).all()
    assert space.captured.dtype == torch.float64


@given(problem=problems(), data=st.data())
def test_subspace_of_full_width_is_exact(problem, data):
    """With a sketch as wide as the matrix, only float rounding separates the two solvers."""
    rank = data.draw(st.integers(0, problem.limit))
    space = column_space(problem.weight, rank, problem.metric, Subspace(2, 16))
    error = problem.metric.norm(problem.weight - product(space))
    assert abs(error - optimum(problem, rank)) <= 1e-5 * whole(problem)


def power_law(n, power, outliers, g, tokens=None):
    """H with eigenvalues ``i^-power`` in a random basis and channels 5 to 30 times larger."""
    basis = torch.linalg.qr(gaussian(n, n, g)).Q
    S = basis * torch.arange(1, n + 1).double() ** (-power / 2)
    channels = torch.randperm(n, generator=g)[:outliers]
    S[channels] *= torch.empty(outliers, 1, dtype=torch.float64).uniform_(5, 30, generator=g)
    if tokens:
        S = S @ gaussian(n, tokens, g) / tokens**0.5
    return S @ S.T


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize(("power", "tokens"), [(1.0, None), (1.0, 256), (1.5, None), (2.0, None)])
def test_default_subspace_is_within_half_a_percent(rank, fisher, power, tokens):
    g = generator(rank)
    H = power_law(512, power, 4, g, tokens)
    metric = Metric(H, power_law(384, power, 4, g) if fisher else None)
    weight = gaussian(384, 512, g)
    residual = weight - (weight / 0.9).round().clamp(-4, 3) * 0.9  # int3 rounding noise
    best = float(spectrum(residual, metric)[rank:].norm())
    space = column_space(residual.float(), rank, metric, Subspace())
    error = metric.norm(residual - product(space))
    assert best * (1 - 1e-6) <= error <= best * 1.005
    # the energy it reports is the energy it takes, to float32 of the whole
    total = metric.squared_norm(residual)
    assert total - float(space.captured.sum()) == pytest.approx(error**2, abs=3e-6 * total)


@pytest.mark.parametrize("rank", [64, 128])
def test_default_subspace_takes_more_steps_for_flat_spectra(rank):
    matrix = gaussian(500, 600, generator(0)).float()
    best = float(spectrum(matrix, Metric())[rank:].norm())
    error = {most: float((matrix - product(column_space(matrix, rank, Metric(), Subspace(most=most)))).norm())
             for most in (2, 6)}  # fmt: skip
    assert best <= error[6] <= 1.005 * best < error[2]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_steps_help(steps):
    g = generator(0)
    metric, matrix = Metric(power_law(128, 0.5, 2, g)), gaussian(96, 128, g)
    error = [
        metric.norm(matrix - product(column_space(matrix, 8, metric, Subspace(s, 4, most=s))))
        for s in (steps, steps + 1)
    ]
    assert error[1] < error[0]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("solver", [Exact(), Subspace()])
def test_scales_of_all_three_do_not_matter(scale, solver):
    """``W``, ``H`` and ``G`` of one extreme scale: powers of it leave the range of float32."""
    g = generator(3)
    matrix, H, G = gaussian(40, 60, g), psd(60, 80, 1.0, g), psd(40, 50, 1.0, g)
    best = float(oracle_sigma(matrix, H, G)[5:].norm())
    space = column_space((scale * matrix).float(), 5, Metric(scale * H, scale * G), solver)
    error = Metric(H, G).norm(matrix - product(space) / scale)
    assert error <= best * 1.005
    total = float(oracle_sigma(matrix, H, G).norm()) ** 2
    assert float(space.captured.sum()) == pytest.approx((total - best**2) * scale**4, rel=1e-2)


def test_seed_decides_the_sketch():
    g = generator(0)
    metric, matrix = Metric(psd(60, 60, 1.0, g)), gaussian(50, 60, g)
    state = torch.random.get_rng_state()
    a, b, other = (column_space(matrix, 4, metric, Subspace(0, 2, seed)) for seed in (0, 0, 1))
    assert torch.equal(a.left, b.left)
    assert not torch.equal(a.left, other.left)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("solver", [Exact(), Subspace()])
@pytest.mark.parametrize("metric", [Metric(), Metric(torch.zeros(5, 5)), Metric(None, torch.zeros(3))])
def test_nothing_to_capture(solver, metric):
    matrix = torch.zeros(3, 5) if metric.hessian is None and metric.gradient is None else torch.ones(3, 5)
    space = column_space(matrix, 2, metric, solver)
    assert space.left.shape == (3, 0)
    assert space.right.shape == (0, 5)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (3, 4)])
def test_rank_zero_and_empty(shape):
    space = column_space(torch.ones(shape), 0, Metric())
    assert (space.left.shape, space.right.shape) == ((shape[0], 0), (0, shape[1]))


def test_diagonal_sides_equal_dense_ones():
    g = generator(1)
    h, q = torch.rand(7, generator=g).double(), torch.rand(5, generator=g).double()
    for matrix, metric in ((gaussian(5, 7, g), (h, q)), (gaussian(7, 5, g), (q, h))):
        for solver in (Exact(), Subspace()):
            found = product(column_space(matrix, 2, Metric(*metric), solver))
            dense = product(column_space(matrix, 2, Metric(*map(torch.diag, metric)), solver))
            torch.testing.assert_close(found, dense)


def test_inputs_are_not_changed():
    g = generator(2)
    matrix, H, G = gaussian(6, 4, g), psd(4, 4, 1.0, g), psd(6, 6, 1.0, g)
    copies = [t.clone() for t in (matrix, H, G)]
    for solver in (Exact(), Subspace()):
        column_space(matrix, 4, Metric(H, G), solver)
    assert all(map(torch.equal, (matrix, H, G), copies))


def test_choice_by_size():
    assert isinstance(choose_solver((1024, 9000), 8), Exact)
    assert isinstance(choose_solver((4096, 4096), 64), Subspace)
    assert isinstance(choose_solver((4096, 2048), 257), Exact)
