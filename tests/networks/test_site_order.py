"""An order is a permutation, never worse than none, finds structure that a shuffle hid, and the SVD does not care."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import generator, problems, well_conditioned

from tnc.decompose import (
    InputPermutation,
    MpoStage,
    OutputPermutation,
    RelativeError,
    SiteOrdering,
    decompose,
    truncated_svd,
)
from tnc.errors import LawError, RankError, ShapeError
from tnc.metric import Metric
from tnc.networks import Rows, shared_order, tt_svd
from tnc.networks.site_order import assigned, best_order, site_order
from tnc.terms import Dense, dense64
from tnc.testing import check_order_blind


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
    check_order_blind(lambda w, rank, metric: truncated_svd(w, rank, metric=metric), max_examples=30)
    with pytest.raises(LawError, match="order_does_not_matter"):
        check_order_blind(lambda w, rank, metric: decompose(w, (MpoStage(rank),)).operator)


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
    assert torch.equal(assigned(given[:, order].T @ given), order)
    places = torch.randn(9, 5, generator=generator(4), dtype=torch.float64)
    best = min(float((given[:, list(each)] - places).norm()) for each in permutations(range(5)))
    assert float((given[:, assigned(places.T @ given)] - places).norm()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_search_keeps_the_best_order_it_fitted_and_fits_none_twice(rounds):
    fitted = []

    def fit(order):
        fitted.append(order)
        return {1: 5.0, 2: 4.0, 3: 4.5, 11: 6.0, 12: 3.0, 13: 9.0}[order], "fit"

    found = best_order(1, 11, fit, lambda order, _: order + 1, rounds)
    assert fitted == {0: [1], 1: [1, 11], 3: [1, 2, 3, 11, 12, 13]}[rounds]
    best = {0: (1, 5.0, "given"), 1: (1, 5.0, "given"), 3: (12, 3.0, "spectral")}[rounds]
    assert (found.order, found.after, found.start) == best and found.before == 5.0


def test_a_shared_order_of_one_weight_is_the_order_of_its_rows():
    problem, modes = well_conditioned(16, 36, 0), ((4, 4), (6, 6))
    metric = Metric.full(problem.stats())
    alone = site_order(problem.weight, 4, metric=metric, modes=modes, rounds=3, columns=False)
    shared = shared_order([Rows(problem.weight, 4, modes, metric)])
    assert torch.equal(alone.rows, shared.rows) and alone.start == shared.start
    assert (alone.before, alone.after) == pytest.approx((shared.before, shared.after), rel=1e-9)


@settings(max_examples=10)
@given(seeds=st.lists(st.integers(0, 99), min_size=2, max_size=3, unique=True), rank=st.integers(1, 3))
def test_a_shared_order_is_never_worse_in_total_and_its_errors_are_those_of_tt_svd(seeds, rank):
    weights = [torch.randn(12, 6 + seed % 5, generator=generator(seed), dtype=torch.float64) for seed in seeds]
    modes = [((3, 4), (1, weight.shape[1])) for weight in weights]
    found = shared_order([Rows(w, rank, m) for w, m in zip(weights, modes, strict=True)], rounds=2)
    assert torch.equal(found.rows.sort().values, torch.arange(12)) and found.after <= found.before
    for rows, expected in ((torch.arange(12), found.before), (found.rows, found.after)):
        left = [w[rows] - dense64(tt_svd(w[rows], *m, max_rank=rank)) for w, m in zip(weights, modes, strict=True)]
        total = sum(float(e.square().sum()) for e in left) / sum(float(w.square().sum()) for w in weights)
        assert total**0.5 == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_shared_order_needs_equally_many_rows():
    one, two = Rows(torch.ones(4, 4), 1, ((2, 2), (2, 2))), Rows(torch.ones(6, 4), 1, ((2, 3), (2, 2)))
    with pytest.raises(ShapeError, match=r"weights with \[4, 6\] rows; expected one or more with equally many"):
        shared_order([one, two])
    with pytest.raises(ShapeError, match=r"weights with \[\] rows"):
        shared_order([])


def test_an_ordering_is_a_transform_that_is_stored_only_if_it_helps():
    problem = well_conditioned(16, 36, 0)
    stage, stats = MpoStage(4, sweeps=0), problem.stats()
    plain = decompose(problem.weight, (stage,), stats)
    moved = decompose(problem.weight, (stage,), stats, transforms=(SiteOrdering(4),))
    found = site_order(problem.weight, 4, metric=Metric.auto(stats), rounds=3)
    assert found.after < found.before and moved.report.choices == (
        f"site order from {found.start}: {found.before:.4f} to {found.after:.4f} at bond 4, diagonal metric",
    )
    assert moved.report.storage_bits == plain.report.storage_bits + 8 * (16 + 36)
    inner = SiteOrdering(4).apply(problem.weight, stats)
    assert torch.equal(inner.weight, problem.weight.double()[found.rows][:, found.columns])
    assert torch.equal(dense64(inner.wrap(Dense(inner.weight))), problem.weight.double())
    exact = torch.kron(torch.randn(4, 6, generator=generator(1)), torch.randn(4, 6, generator=generator(2)))
    kept = decompose(exact, (stage,), transforms=(SiteOrdering(1),))
    assert kept.report.choices == ("site order: no better one found",) and kept.operator.kind == "mpo"


def test_an_ordering_aims_at_one_bond():
    for size in (RelativeError(0.1), (2, 3)):
        with pytest.raises(RankError, match="integer bond dimension of at least 0, or BitsPerWeight"):
            SiteOrdering(size).apply(torch.ones(4, 4), None)
