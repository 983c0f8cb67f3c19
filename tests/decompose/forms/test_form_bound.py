"""No fit is below the bound; without coupling the bound is attained."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import generator, problems, well_conditioned, whole

from tnc.decompose.form_bound import form_bound
from tnc.decompose.forms import blast, block_low_rank, monarch
from tnc.metric import Metric
from tnc.terms import dense64

FORMS = (block_low_rank, monarch, blast)


def grid(shape):
    return tuple(max(d for d in range(1, 4) if size % d == 0) for size in shape)


@settings(max_examples=40)
@given(problem=problems(sides=("H",), scales=st.sampled_from([1e-2, 1.0, 1e2])), form=st.sampled_from(FORMS),
       data=st.data())  # fmt: skip
def test_no_fit_is_below(problem, form, data):
    blocks = grid(problem.weight.shape)
    limit = min(m // b for m, b in zip(problem.weight.shape, blocks, strict=True))
    term = form(problem.weight, data.draw(st.integers(0, limit)), blocks=blocks, metric=problem.metric, sweeps=2)
    bound = form_bound(problem.weight, term, problem.metric) ** 0.5
    assert bound <= problem.metric.norm(problem.weight - dense64(term)) + 1e-5 * whole(problem)


@pytest.mark.parametrize("form", [block_low_rank, monarch])
def test_uncoupled_blocks_attain_it(form):
    weight = torch.randn(12, 18, generator=generator(0), dtype=torch.float64)
    for metric in (Metric(), Metric(torch.rand(18, generator=generator(1), dtype=torch.float64))):
        term = form(weight, 2, blocks=(3, 2), metric=metric)
        bound = form_bound(weight, term, metric) ** 0.5
        assert bound == pytest.approx(metric.norm(weight - dense64(term)), rel=1e-9)


def test_one_block_is_the_eckart_young_tail():
    problem = well_conditioned(9, 14, 2)
    for form in FORMS:
        term = form(problem.weight, 3, blocks=(1, 1), metric=problem.metric)
        error = problem.metric.norm(problem.weight - dense64(term))
        assert form_bound(problem.weight, term, problem.metric) ** 0.5 == pytest.approx(error, rel=1e-6)


def test_it_says_something_about_coupled_blocks():
    problem = well_conditioned(20, 24, 3)
    for form in FORMS:
        term = form(problem.weight, 3, blocks=(2, 2), metric=problem.metric, sweeps=10)
        error = problem.metric.norm(problem.weight - dense64(term))
        assert 0.3 * error < form_bound(problem.weight, term, problem.metric) ** 0.5 < error
