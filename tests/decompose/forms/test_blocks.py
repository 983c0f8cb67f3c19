"""Block low rank, Monarch and BLAST: the laws of forms, closed forms by hand, and descent that never climbs."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import brute_squared_norm, generator, problems, sym_root, well_conditioned, whole
from torch import Tensor

from tnc.column_space import spectrum
from tnc.decompose import BitsPerWeight, RelativeError, truncated_svd
from tnc.decompose.forms import blast, block_low_rank, monarch
from tnc.errors import BudgetError, RankError, ShapeError
from tnc.metric import Metric
from tnc.terms import BlockLowRank, Monarch, dense64
from tnc.testing import check_form


def divisor(size: int, most: int = 3) -> int:
    return max(d for d in range(1, most + 1) if size % d == 0)


def grid(shape) -> tuple[int, int]:
    return divisor(shape[0]), divisor(shape[1])


def brute_norm(problem, term) -> float:
    return max(brute_squared_norm(problem.weight - dense64(term), problem.H, problem.G), 0.0) ** 0.5


def block_limit(shape) -> int:
    outs, ins = grid(shape)
    return min(shape[0] // outs, shape[1] // ins)


@pytest.mark.parametrize("form", [block_low_rank, monarch])
def test_blocks_obey_the_laws(form):
    def decomposer(weight: Tensor, rank: int, metric: Metric):
        return form(weight, rank, blocks=grid(weight.shape), metric=metric, sweeps=1)

    check_form(decomposer, block_limit, max_examples=25)


def test_blast_obeys_the_laws():
    def decomposer(weight: Tensor, rank: int, metric: Metric):
        return blast(weight, rank, blocks=grid(weight.shape), metric=metric, sweeps=1)

    check_form(decomposer, min, max_examples=25)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 12)])
@pytest.mark.parametrize("cls", [BlockLowRank, Monarch])
def test_without_coupling_every_block_is_its_own_truncated_svd(cls, shape):
    """The projection of arXiv:2204.00595 for any rank, block by block with a plain SVD."""
    weight = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    (outs, ins), rank = grid(shape), 2
    form = monarch if cls is Monarch else block_low_rank
    expected = torch.empty_like(weight)
    for j in range(outs):
        rows = slice(j, None, outs) if cls is Monarch else slice(j * shape[0] // outs, (j + 1) * shape[0] // outs)
        for k in range(ins):
            columns = slice(k * shape[1] // ins, (k + 1) * shape[1] // ins)
            U, s, Vh = torch.linalg.svd(weight[rows, columns], full_matrices=False)
            expected[rows, columns] = U[:, :rank] * s[:rank] @ Vh[:rank]
    found = form(weight, rank, blocks=(outs, ins))
    assert type(found) is cls
    torch.testing.assert_close(found.to_dense(), expected)


def test_monarch_of_rank_one_is_block_diagonal_permutation_block_diagonal():
    """``P L Pᵀ R`` by explicit matrices, m = n = 9: definition 3.1 of arXiv:2204.00595."""
    g = generator(3)
    left, right = torch.randn(3, 3, 3, 1, generator=g), torch.randn(3, 3, 1, 3, generator=g)
    L, R = torch.block_diag(*left.squeeze(-1)), torch.block_diag(*right.squeeze(2))
    P = torch.eye(9)[torch.arange(9).reshape(3, 3).T.flatten()]
    torch.testing.assert_close(Monarch(left, right).to_dense(), P @ L @ P.T @ R)


@settings(max_examples=25)
@given(problem=problems(scales=st.sampled_from([1e-2, 1.0, 1e2])), data=st.data())
def test_descent_never_climbs(problem, data):
    blocks = grid(problem.weight.shape)
    rank = data.draw(st.integers(0, block_limit(problem.weight.shape)))
    slack = 1e-6 * whole(problem)
    for form in (block_low_rank, monarch, blast):
        errors = []
        for sweeps in (0, 1, 2):
            term = form(problem.weight, rank, blocks=blocks, metric=problem.metric, sweeps=sweeps)
            errors.append(brute_norm(problem, term))
        assert errors[1] <= errors[0] + slack and errors[2] <= errors[1] + slack, form


@settings(max_examples=25)
@given(problem=problems(scales=st.sampled_from([1e-2, 1.0, 1e2])), data=st.data())
def test_blast_is_never_above_truncated_svd_of_its_rank(problem, data):
    rank = data.draw(st.integers(0, problem.limit))
    term = blast(problem.weight, rank, blocks=grid(problem.weight.shape), metric=problem.metric, sweeps=1)
    error = brute_norm(problem, term)
    tail = float(spectrum(problem.weight, problem.metric)[rank:].norm())
    assert error <= tail + 1e-6 * whole(problem)


def test_coupled_descent_and_blast_gain_where_blocks_are_correlated():
    problem = well_conditioned(24, 36, 0, fisher=True)
    fits = {sweeps: block_low_rank(problem.weight, 3, blocks=(2, 3), metric=problem.metric, sweeps=sweeps)
            for sweeps in (0, 5)}  # fmt: skip
    before, after = (problem.metric.norm(problem.weight - dense64(term)) for term in fits.values())
    assert after < 0.97 * before
    low_rank = problem.metric.norm(problem.weight - dense64(truncated_svd(problem.weight, 6, metric=problem.metric)))
    coupled = blast(problem.weight, 6, blocks=(4, 4), metric=problem.metric, sweeps=20)
    assert problem.metric.norm(problem.weight - dense64(coupled)) < 0.97 * low_rank


@pytest.mark.parametrize("form", [block_low_rank, monarch, blast])
def test_a_fixed_point_of_descent_is_stationary(form):
    """After many sweeps the gradient in every factor vanishes: autograd knows nothing of the closed forms."""
    problem = well_conditioned(8, 12, 5, fisher=True)
    term = form(problem.weight, 1, blocks=(2, 2), metric=problem.metric, sweeps=400)
    leaves = {k: t.double().requires_grad_() for k, t in term.tensors().items()}
    E = sym_root(problem.G) @ (problem.weight - type(term)(**leaves).to_dense()) @ sym_root(problem.H)
    E.square().sum().backward()
    largest = max(float((t.grad.norm() * t.norm()).detach()) for t in leaves.values())
    assert largest < 1e-3 * float(E.detach().square().sum())


@pytest.mark.parametrize("form", [block_low_rank, monarch, blast])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_are_met_as_stored(form, dtype):
    problem = well_conditioned(24, 36, 1)
    weight, fit = problem.weight.to(dtype), partial(form, blocks=(2, 3), metric=problem.metric, sweeps=1)
    term = fit(weight, BitsPerWeight(5))
    more = fit(weight, term.rank + 1)
    assert term.storage_bits <= 5 * weight.numel() < more.storage_bits
    near = fit(weight, RelativeError(0.2))
    error = partial(problem.metric.relative, weight=weight.double())
    assert error(weight.double() - dense64(near)) <= 0.2 < error(weight.double() - dense64(fit(weight, near.rank - 1)))
    assert fit(torch.zeros_like(weight), RelativeError(0)).rank == 0


def test_flawed_requests_say_what_would_do():
    weight = torch.randn(10, 12, generator=generator(0))
    with pytest.raises(ShapeError, match=r"3 blocks do not divide out_features=10 .*; use one of 1, 2, 5, 10"):
        monarch(weight, 1, blocks=(3, 2))
    with pytest.raises(ShapeError, match=r"5 blocks do not divide in_features=12"):
        blast(weight, 1, blocks=(1, 5))
    with pytest.raises(RankError, match=r"block_low_rank\(rank=6\) is outside 0 <= rank <= 5"):
        block_low_rank(weight, 6, blocks=(2, 2))
    with pytest.raises(BudgetError, match=r"RelativeError\(0\) cannot be met by blast: at its largest rank 10"):
        blast(weight.bfloat16(), RelativeError(0), blocks=(1, 1))
