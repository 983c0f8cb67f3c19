"""An order is a permutation, never worse than none, finds structure that a shuffle hid, and the SVD does not care."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import generator, problems, well_conditioned

from tnc.decompose import InputPermutation, MpoStage, OutputPermutation, decompose, truncated_svd
from tnc.errors import RankError
from tnc.metric import Metric
from tnc.networks import tt_svd
from tnc.networks.site_order import _match, site_order
from tnc.terms import dense64


@settings(max_examples=20)
@given(problem=problems(scales=st.sampled_from([1e-2, 1.0, 1e2])), rank=st.integers(1, 3), data=st.data())
def test_it_is_a_permutation_and_never_worse(problem, rank, data):
    rows, columns = data.draw(st.booleans()), data.draw(st.booleans())
    found = site_order(problem.weight, rank, metric=problem.metric, rounds=2, rows=rows, columns=columns)
    assert torch.equal(found.rows.sort().values, torch.arange(problem.weight.shape[0]))
    assert torch.equal(found.columns.sort().values, torch.arange(problem.weight.shape[1]))
    assert found.after <= found.before
    if not rows:
        assert torch.equal(found.rows, torch.arange(problem.weight.shape[0]))


def test_the_errors_are_those_of_tt_svd():
    weight = torch.randn(12, 18, generator=generator(0), dtype=torch.float64)
    found = site_order(weight, 3)
    for order, expected in (((slice(None), slice(None)), found.before), ((found.rows, found.columns), found.after)):
        moved = weight[order[0]][:, order[1]]
        fitted = tt_svd(moved, max_rank=3).to_dense()
        assert float((moved - fitted).norm() / weight.norm()) == pytest.approx(expected, rel=1e-6)


def test_a_hidden_order_is_partly_found():
    """A sum of two Kronecker products, columns shuffled: exact in the right order."""
    g = generator(1)
    cores = (torch.randn(1, 4, 4, 1, generator=g).double(), torch.randn(1, 4, 4, 1, generator=g).double())
    weight = torch.kron(cores[0][0, ..., 0], cores[1][0, ..., 0])
    shuffled = weight[:, torch.randperm(16, generator=g)]
    found = site_order(shuffled, 1, modes=((4, 4), (4, 4)), rounds=20)
    assert site_order(weight, 1, modes=((4, 4), (4, 4))).before < 1e-7
    assert found.after < 0.9 * found.before


def test_permuting_leaves_the_svd_alone_but_not_the_mpo():
    problem = well_conditioned(16, 36, 0)
    weight, order = problem.weight, torch.randperm(36, generator=generator(2))
    svd = [float((w - truncated_svd(w, 4).to_dense()).norm()) for w in (weight, weight[:, order])]
    mpo = [float((w - tt_svd(w, max_rank=4).to_dense()).norm()) for w in (weight, weight[:, order])]
    assert svd[0] == pytest.approx(svd[1], rel=1e-9) and abs(mpo[0] - mpo[1]) > 1e-4 * mpo[0]


def test_the_order_is_stored_and_counted_as_a_transform():
    problem = well_conditioned(16, 36, 0)
    found = site_order(problem.weight, 4, metric=Metric.full(problem.stats()))
    moves = (OutputPermutation(tuple(found.rows.tolist())), InputPermutation(tuple(found.columns.tolist())))
    stage = MpoStage(4, sweeps=1)
    plain = decompose(problem.weight, (stage,), problem.stats())
    moved = decompose(problem.weight, (stage,), problem.stats(), transforms=moves)
    assert moved.report.storage_bits == plain.report.storage_bits + 8 * (16 + 36)
    assert dense64(moved.operator).shape == (16, 36)


def test_flawed_ranks():
    with pytest.raises(RankError):
        site_order(torch.ones(4, 4), 0)


def test_the_assignment_is_the_closest_one():
    """Columns that were moved are found again, and with noise no order in total is closer (all 120 of them)."""
    given = torch.randn(9, 5, generator=generator(3), dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(_match(given, given[:, order]), order)
    places = torch.randn(9, 5, generator=generator(4), dtype=torch.float64)
    best = min(float((given[:, list(each)] - places).norm()) for each in permutations(range(5)))
    assert float((given[:, _match(given, places)] - places).norm()) == pytest.approx(best, rel=1e-12)
