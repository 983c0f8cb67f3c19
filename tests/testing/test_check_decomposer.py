"""`check_decomposer`: the library's decomposers obey the laws, and each broken one is caught by name."""

import itertools
import math
import re

import pytest
import torch

import tnc.testing
from tnc.column_space import Subspace
from tnc.decompose import compensate, truncated_svd
from tnc.errors import LawError
from tnc.terms import Dense, LowRank
from tnc.testing import check_decomposer, make_problem, weighted_problems

LAWS = (
    "shape_is_kept", "entries_are_finite", "inputs_are_unchanged", "weight_is_not_aliased", "dtype_is_kept",
    "zero_gives_zero", "error_is_at_least_the_tail", "full_rank_reconstructs", "rank_never_hurts",
    "error_scales_with_the_weight",
)  # fmt: skip


def best(weight, rank, metric):
    return truncated_svd(weight, rank, metric=metric)


def changed(change):
    """The right answer with its factors changed: change(left, right)."""

    def decomposer(weight, rank, metric):
        term = best(weight, rank, metric)
        return LowRank(*change(term.left, term.right))

    return decomposer


def test_truncated_svd_is_optimal_in_every_metric():
    assert check_decomposer(best, optimal=True, max_examples=30) == (*LAWS[:6], "error_equals_the_tail", *LAWS[6:])


def test_compensating_an_empty_base_is_truncated_svd():
    def decomposer(weight, rank, metric):
        empty = LowRank(weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1]))
        return compensate(weight, empty, rank, metric=metric)

    check_decomposer(decomposer, optimal=True, max_examples=15)


def test_subspace_iteration_on_moderate_statistics():
    def decomposer(weight, rank, metric):
        return truncated_svd(weight, rank, metric=metric, solver=Subspace())

    problems = weighted_problems(hessians=("full", "identity", "deficient"))
    check_decomposer(decomposer, problems=problems, max_examples=15)


def swapped_axes(weight, rank, metric):
    term = truncated_svd(weight.T, rank)
    return LowRank(term.left, term.right)


def in_place(weight, rank, metric):
    term = best(weight, rank, metric)
    weight.mul_(1 + 2**-5)
    return term


def damps_the_metric(weight, rank, metric):
    term = best(weight, rank, metric)
    if metric.hessian is not None:
        metric.hessian.add_(1e-3)
    return term


def aliasing(weight, rank, metric):
    """Exact when the rank is full, and then no copy."""
    if rank == weight.shape[1]:
        return LowRank(weight, torch.eye(rank, dtype=weight.dtype))
    return best(weight, rank, metric)


def one_rank_more(weight, rank, metric):
    return best(weight, min(rank + 1, *weight.shape), metric)


def one_rank_less(weight, rank, metric):
    return best(weight, max(rank - 1, 0), metric)


def plain_svd(weight, rank, metric):
    return truncated_svd(weight, rank)


def without_gradient(weight, rank, metric):
    return truncated_svd(weight, rank, metric=type(metric)(metric.hessian))


def smallest_for_even_ranks(weight, rank, metric):
    full = best(weight, min(weight.shape), metric)
    kept = slice(0, rank) if rank % 2 else slice(full.rank - rank, None)
    return LowRank(full.left[:, kept], full.right[kept])


def lazy_at_some_scales(weight, rank, metric):
    """Leaves out a rank, but not the last, where the exponent of the largest entry says so."""
    if rank == min(weight.shape) or math.frexp(float(weight.abs().max()))[1] // 2 % 2:
        return best(weight, rank, metric)
    return best(weight, max(rank - 1, 0), metric)


def adds_one_to_zero(weight, rank, metric):
    return Dense(torch.ones_like(weight)) if not weight.any() else best(weight, rank, metric)


def keeps_float32(weight, rank, metric):
    return truncated_svd(weight.float(), rank, metric=metric)


def divides_by_zero(weight, rank, metric):
    term = best(weight, rank, metric)
    return LowRank(term.left * (term.right.norm() / term.right.norm()), term.right)


def inverts_the_hessian(weight, rank, metric):
    """The textbook way: whiten by a Cholesky factor, truncate, multiply by its inverse."""
    if metric.hessian is None or metric.hessian.ndim == 1:
        return best(weight, rank, metric)
    factor = torch.linalg.cholesky(metric.hessian)
    U, s, Vh = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    right = torch.linalg.solve_triangular(factor, Vh[:rank], upper=False, left=False)
    return LowRank((U[:, :rank] * s[:rank]).to(weight.dtype), right.to(weight.dtype))


# Few choices, so that the search for the smallest case is short; the whole domain is searched above.
SMALL = weighted_problems(
    (4, 3), spectra=("flat", "power", "zero"), dtypes=(torch.float64, torch.float32), scales=(1.0, 1e2),
    hessians=("identity", "full", "deficient"), metrics=("identity", "full", "fisher"),
)  # fmt: skip
CURVED = weighted_problems((4, 3), spectra=("power", "flat"), hessians=("full", "deficient"), metrics=("fisher",))

BROKEN = {
    swapped_axes: "shape_is_kept",
    lambda weight, rank, metric: best(weight, rank, metric).to_dense(): "shape_is_kept",
    inverts_the_hessian: "shape_is_kept",
    divides_by_zero: "entries_are_finite",
    in_place: "inputs_are_unchanged",
    damps_the_metric: "inputs_are_unchanged",
    aliasing: "weight_is_not_aliased",
    keeps_float32: "dtype_is_kept",
    adds_one_to_zero: "zero_gives_zero",
    one_rank_more: "error_is_at_least_the_tail",
    one_rank_less: "full_rank_reconstructs",
    changed(lambda left, right: (-left, right)): "full_rank_reconstructs",
    changed(lambda left, right: (left, right.flip(1))): "full_rank_reconstructs",
    changed(lambda left, right: (left, 0.99 * right)): "full_rank_reconstructs",
    smallest_for_even_ranks: "rank_never_hurts",
    lazy_at_some_scales: "error_scales_with_the_weight",
}


@pytest.mark.parametrize(
    ("decomposer", "law"), BROKEN.items(), ids=[f"{law}-{i}" for i, law in enumerate(BROKEN.values())]
)
def test_a_broken_decomposer_is_caught_by_its_law(decomposer, law):
    with pytest.raises(LawError, match=rf"^{law}: "):
        check_decomposer(decomposer, problems=SMALL, max_examples=15)


@pytest.mark.parametrize("decomposer", (plain_svd, without_gradient))
def test_ignoring_the_metric_is_not_optimal(decomposer):
    with pytest.raises(LawError, match=r"^error_equals_the_tail: expected the optimal error"):
        check_decomposer(decomposer, optimal=True, problems=CURVED, max_examples=10)


def test_ignoring_the_metric_may_hurt_with_more_rank():
    """In H the error of plain SVD is not monotone: the law says so, and the plain metric is a domain without it."""
    check_decomposer(plain_svd, problems=weighted_problems(metrics=("identity",)), optimal=True, max_examples=20)


def test_the_message_holds_the_smallest_case_as_code():
    with pytest.raises(LawError) as caught:
        check_decomposer(changed(lambda left, right: (-left, right)), max_examples=20)
    message = str(caught.value)
    assert "Smallest failing case: rank 0, weight (1, 1) torch.float64" in message
    code = re.search(r"problem = (tnc\.testing\.make_problem\(.*?\)); decomposer", message).group(1)
    problem = eval(code, {"tnc": tnc, "torch": torch})
    assert problem.weight.shape == (1, 1) and problem.weight.dtype == torch.float64
    assert repr(problem) == code


def test_an_exception_names_the_law_and_keeps_its_cause():
    def fails_for_wide(weight, rank, metric):
        if weight.shape[1] > 3:
            raise ValueError("too wide")
        return best(weight, rank, metric)

    with pytest.raises(LawError, match=r"^shape_is_kept: raised ValueError: too wide; expected") as caught:
        check_decomposer(fails_for_wide, max_examples=20)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "weight (1, 4)" in str(caught.value)


def test_a_decomposer_that_is_not_deterministic_is_named():
    calls = itertools.count()

    def by_turns(weight, rank, metric):
        return best(weight if next(calls) != 3 else weight.repeat(2, 1), rank, metric)

    with pytest.raises(LawError, match=r"^shape_is_kept: holds or breaks by turns"):
        check_decomposer(by_turns)


def test_an_error_while_drawing_a_problem_is_not_blamed_on_the_decomposer():
    with pytest.raises(tnc.errors.RecipeError, match="unknown spectrum 'nothing'"):
        check_decomposer(best, problems=weighted_problems(spectra=("nothing",)))


def test_the_search_repeats_with_its_seed():
    def messages(seed):
        seen = []

        def watched(weight, rank, metric):
            seen.append((weight.shape, rank, float(weight.double().sum())))
            return best(weight, rank, metric)

        check_decomposer(watched, max_examples=5, seed=seed)
        return seen

    assert messages(3) == messages(3) != messages(4)
    assert messages(None)


def test_the_problem_of_a_message_is_the_same_every_time():
    a, b = (make_problem((3, 4), spectrum="power", gradient="full", metric="fisher", seed=7) for _ in range(2))
    assert torch.equal(a.weight, b.weight) and torch.equal(a.metric.hessian, b.metric.hessian)
    assert torch.equal(a.metric.gradient, b.metric.gradient) and a.scale == b.scale
