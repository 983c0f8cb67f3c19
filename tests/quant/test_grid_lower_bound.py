import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import case, cases

from tnc.errors import ShapeError
from tnc.formats import IntFormat
from tnc.quant import Grid, fit_grid, gptq, grid_lower_bound, rtn
from tnc.terms import Quantized

FEW = settings(deadline=None, max_examples=40)


@given(cases(scales=(1e-4, 1.0, 1e4)), st.integers(0, 999))
@FEW
def test_below_every_assignment_of_codes(c, seed):
    generator = torch.Generator().manual_seed(seed)
    term = gptq(c.weight, c.stats, c.format)
    bound = grid_lower_bound(c.weight, term, c.hessian)
    assert bound >= 0
    grid = Grid.of(term)
    shift = torch.randint(-1, 2, c.weight.shape, generator=generator)
    near = (term.integer_codes().int() + shift).clamp(0, c.format.levels - 1)
    anything = torch.randint(0, c.format.levels, c.weight.shape, generator=generator)
    for codes in (term.integer_codes(), grid.quantize(c.weight), near, anything):
        assert bound <= c.squared(Quantized.from_codes(codes, grid.scale, grid.zero, c.format))


@given(st.integers(0, 999), st.integers(1, 5), st.booleans(), st.sampled_from((0.0, 0.1, 0.5, 2.0)))
@settings(deadline=None, max_examples=30)
def test_below_the_optimum_by_brute_force(seed, n, symmetric, correlation):
    c = case(seed, 1, 1, n, 2, symmetric=symmetric, correlation=correlation)
    grid = fit_grid(c.weight, c.format)
    codes = torch.tensor(list(itertools.product(range(4), repeat=n)))  # (4**n, n)
    error = c.weight - (codes - grid.zero.double()) * grid.scale.double()
    optimum = float(((error @ c.hessian) * error).sum(-1).min())
    bound = grid_lower_bound(c.weight, grid, c.hessian)
    assert bound <= optimum
    if n == 1:
        assert bound == pytest.approx(optimum, rel=1e-12)


@given(cases(), st.integers(0, 99))
@FEW
def test_exact_for_diagonal_h(c, seed):
    diagonal = torch.rand(c.weight.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    diagonal[0] = 0  # a dead column costs nothing
    grid = fit_grid(c.weight, c.format)
    error = c.weight - grid.dequantize(grid.quantize(c.weight), dtype=torch.float64)
    expected = float((error**2 @ diagonal).sum())
    for hessian in (diagonal, torch.diag(diagonal)):
        assert grid_lower_bound(c.weight, grid, hessian) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 99))
@FEW
def test_at_least_the_smallest_eigenvalue_times_the_plain_error(seed):
    c = case(seed, 4, 2, 6, 3, correlation=0.2, tokens=300)
    grid = fit_grid(c.weight, c.format)
    plain = float((c.weight - grid.dequantize(grid.quantize(c.weight), dtype=torch.float64)).square().sum())
    bound = grid_lower_bound(c.weight, grid, c.hessian)
    assert bound >= plain * float(torch.linalg.eigvalsh(c.hessian)[0]) * (1 - 1e-9)


PAIR, CHAIN = [[1.0, 0.99], [0.99, 1.0]], [[1.0, 0.6, 0.0], [0.6, 1.0, 0.6], [0.0, 0.6, 1.0]]


@pytest.mark.parametrize(
    ("blocks", "weight", "expected"),
    [
        # d = 1 gives t = 1 everywhere; diag(H) gives t = 0.01, 1 / diag(H^-1) t = 1 / 1.99
        (([[100.0, 99.0], [99.0, 100.0]], [[1.0]]), [0.5, 0.5, 0.5], 0.75),
        # d = diag(H) gives the chain's t = 1 - 0.6 sqrt(2); d = 1 only t = 0.01, 1 / diag(H^-1) 0.42 * 0.28
        ((CHAIN, [[0.01]]), [0.0, 0.5, 0.0, 0.0], 0.25 * (1 - 0.6 * 2**0.5)),
        # d = 1 / diag(H^-1) gives t = 1 / 1.99, d = (0.0199, 0.0199, 5); the other two t = 0.01
        ((PAIR, [[5.0]]), [0.5, 0.5, 0.5], 0.25 * (2 * 0.0199 + 5) / 1.99),
    ],
    ids=["plain", "diagonal", "inverse"],
)
def test_each_scaling_is_the_best_somewhere(blocks, weight, expected):
    hessian = torch.block_diag(*(torch.tensor(b).double() for b in blocks))
    grid = Grid(torch.ones(1, 1).half(), torch.zeros(1, 1, dtype=torch.uint8), IntFormat(2))
    assert grid_lower_bound(torch.tensor([weight]), grid, hessian) == pytest.approx(expected, rel=1e-6)


def test_zero_for_singular_h():
    c = case(0, 4, 2, 8, 3, tokens=3)
    assert grid_lower_bound(c.weight, rtn(c.weight, c.format), c.hessian) == 0.0
    assert grid_lower_bound(c.weight, rtn(c.weight, c.format), torch.zeros(16, 16)) == 0.0


def test_shapes_must_agree():
    c = case(0, 4, 2, 8, 3)
    with pytest.raises(ShapeError, match=r"hessian has shape \(3, 3\); expected \(16, 16\)"):
        grid_lower_bound(c.weight, rtn(c.weight, c.format), torch.eye(3))
    with pytest.raises(ShapeError, match=r"columns have shape \(4, 16\); expected \(4, 8\)"):
        grid_lower_bound(c.weight, rtn(c.weight[:, :8], c.format), c.hessian)
