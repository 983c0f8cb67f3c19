"""Tensor ring, Tucker and CP: laws, TensorLy as the oracle of the start, and refinement that never climbs."""

from functools import partial
from itertools import product
from math import prod

import numpy as np
import pytest
import tensorly.decomposition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import brute_squared_norm, gaussian, generator, problems, psd, well_conditioned, whole
from torch import Tensor

from tnc.decompose import BitsPerWeight, truncated_svd
from tnc.decompose.forms import block_term, cp, tensor_ring, tucker
from tnc.decompose.refine import refine
from tnc.errors import RankError, ShapeError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.networks import exact_modes, tt_svd
from tnc.quant import rtn
from tnc.terms import LowRank, Sum, dense64
from tnc.testing import check_form, weighted_problems

SMALL = weighted_problems(scales=(1.0, 1e-3, 1e3), dtypes=(torch.float64, torch.float32, torch.bfloat16))


def legs(shape, cores):
    return (*exact_modes(shape[0], cores), *exact_modes(shape[1], cores)[::-1])


def limits(form):
    if form is tensor_ring:
        return lambda shape: min(legs(shape, 2)[0] * legs(shape, 2)[2], legs(shape, 2)[1] * legs(shape, 2)[3])
    return lambda shape: (
        max(legs(shape, 2)) if form in (tucker, block_term) else prod(legs(shape, 2)) // max(legs(shape, 2))
    )


@pytest.mark.parametrize("form", [tensor_ring, tucker, block_term, cp])
def test_they_obey_the_laws(form):
    def decomposer(weight: Tensor, rank: int, metric: Metric):
        return form(weight, rank, cores=2, metric=metric, sweeps=1)

    check_form(decomposer, limits(form), exact=form is not cp, scales=False, problems=SMALL, max_examples=8)


def test_tucker_in_the_frobenius_norm_is_tensorlys():
    weight = torch.randn(12, 18, generator=generator(0), dtype=torch.float64)
    term = tucker(weight, 3, sweeps=0)
    tensor = weight.reshape(legs((12, 18), 2)).numpy()
    core, factors = tensorly.decomposition.tucker(tensor, rank=list(term.ranks), n_iter_max=10)
    expected = np.linalg.norm(tensor - tensorly.tucker_to_tensor((core, factors)))
    assert float((weight - term.to_dense()).norm()) == pytest.approx(expected, rel=1e-6)


def test_block_terms_find_a_sum_of_tucker_terms_that_one_term_cannot_hold():
    """Oracle: two blocks with disjoint supports in every mode, each of multilinear rank 1; one term needs rank 2."""
    tensor = torch.zeros(4, 4, 4, 4, dtype=torch.float64)
    tensor[:2, :2, :2, :2] = 3.0
    tensor[2:, 2:, 2:, 2:] = 1.0
    weight, modes = tensor.reshape(16, 16), ((4, 4), (4, 4))
    blocks = block_term(weight, 1, terms=2, modes=modes)
    assert [term.ranks for term in blocks.terms] == [(1, 1, 1, 1)] * 2
    torch.testing.assert_close(blocks.to_dense(), weight)
    assert float((weight - tucker(weight, 1, modes=modes).to_dense()).norm()) > 3.9


def test_a_block_term_form_needs_two_terms():
    with pytest.raises(RankError, match=r"block_term\(terms=1\) has no sum; use at least 2 terms"):
        block_term(torch.zeros(4, 4), 1, terms=1)


def test_the_ring_is_never_above_the_train_it_starts_from():
    weight = torch.randn(12, 18, generator=generator(1), dtype=torch.float64)
    train = tt_svd(weight, (2, 2, 3), (3, 3, 2), max_rank=4)
    ring = tensor_ring(weight, 4, modes=((2, 2, 3), (3, 3, 2)), sweeps=0)
    torch.testing.assert_close(ring.to_dense(), train.to_dense())
    better = tensor_ring(weight, 4, modes=((2, 2, 3), (3, 3, 2)), sweeps=3)
    assert float((weight - better.to_dense()).norm()) < 0.99 * float((weight - train.to_dense()).norm())


@settings(max_examples=15)
@given(
    problem=problems(scales=st.sampled_from([1e-2, 1.0, 1e2])),
    form=st.sampled_from([tensor_ring, tucker, block_term, cp]),
)
def test_refinement_never_climbs(problem, form):
    errors = []
    for sweeps in (0, 1, 2):
        term = form(problem.weight, 1, cores=2, metric=problem.metric, sweeps=sweeps)
        error = brute_squared_norm(problem.weight - dense64(term), problem.H, problem.G)
        errors.append(max(error, 0.0) ** 0.5)
    slack = 1e-6 * whole(problem)
    assert errors[1] <= errors[0] + slack and errors[2] <= errors[1] + slack


@pytest.mark.parametrize("form", [tensor_ring, tucker, block_term, cp])
def test_refinement_of_an_exact_start_stays_exact(form):
    """Conjugate gradients on what rounding leaves once went to 1e58."""
    for tokens, scale in product((1, 2, 3, 4), (1e-6, 1e-3, 1.0, 1e3, 1e6)):
        g = generator(0)
        weight = gaussian(5, 1, g) @ gaussian(1, 1, g)
        metric = Metric(psd(1, tokens, scale, g))
        start, found = (form(weight, 1, cores=2, metric=metric, sweeps=sweeps) for sweeps in (0, 2))
        before, after = (float((weight - dense64(term)).norm()) for term in (start, found))
        assert after <= max(before, 1e-14 * float(weight.norm()))


def test_refinement_of_a_poor_low_rank_start_reaches_the_optimum():
    problem = well_conditioned(10, 14, 2, fisher=True)
    g = generator(3)
    start = LowRank(torch.randn(10, 3, generator=g), torch.randn(3, 14, generator=g))
    found = refine(problem.weight, start, problem.metric, sweeps=40, steps=20)
    best = truncated_svd(problem.weight, 3, metric=problem.metric)
    reached, optimum = (problem.metric.norm(problem.weight - dense64(t)) for t in (found, best))
    assert optimum <= reached * (1 + 1e-9) <= optimum * 1.001
    assert start.left.dtype == torch.float32, "the start is left alone"


def test_refinement_leaves_a_quantized_base_alone():
    problem = well_conditioned(8, 12, 4)
    base = rtn(problem.weight, IntFormat(2))
    start = Sum((base, LowRank(torch.zeros(8, 2), torch.randn(2, 12, generator=generator(0)))))
    found = refine(problem.weight, start, problem.metric, sweeps=10)
    assert torch.equal(found.terms[0].codes, base.codes)
    torch.testing.assert_close(found.terms[0].scale, base.scale.double())
    before, after = (problem.metric.norm(problem.weight - dense64(t)) for t in (base, found))
    assert after < 0.95 * before


@pytest.mark.parametrize("form", [tensor_ring, tucker, block_term, cp])
def test_bits_are_met_and_used(form):
    weight = torch.randn(16, 36, generator=generator(0)).bfloat16()
    fit = partial(form, sweeps=0)
    term = fit(weight, BitsPerWeight(6))
    assert term.storage_bits <= 6 * weight.numel()
    again = [k for k in range(1, 60) if _fits(fit, weight, k, term.storage_bits)]
    assert fit(weight, again[-1] + 1).storage_bits > 6 * weight.numel()


def _fits(fit, weight, rank, bits):
    try:
        return fit(weight, rank).storage_bits == bits
    except RankError:
        return False


def test_modes_must_multiply_to_the_shape():
    weight = torch.zeros(6, 7)
    with pytest.raises(ShapeError, match=r"modes \(2, 3\) x \(2, 4\) multiply to \(6, 8\) for weight \(6, 7\)"):
        cp(weight, 1, modes=((2, 3), (2, 4)))
    assert cp(weight, 1).spec()["modes"] == [2, 3, 7, 1], "a prime has the modes 7 and 1"
