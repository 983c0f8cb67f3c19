"""Laws of structured forms: functions ``(weight, rank, metric) -> Expression`` whose rank is not that of a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.metric import Metric
from tnc.terms import dense64
from tnc.testing.decomposer_laws import (
    Decomposer,
    RankCase,
    dtype_is_kept,
    entries_are_finite,
    error_scales_with_the_weight,
    inputs_are_unchanged,
    judge,
    shape_is_kept,
    weight_is_not_aliased,
    zero_gives_zero,
)
from tnc.testing.harness import Law, require, search_laws
from tnc.testing.oracle import error_in
from tnc.testing.problems import WeightedProblem
from tnc.testing.strategies import weighted_problems

Limit = Callable[[tuple[int, int]], int]


def check_form(
    decomposer: Decomposer, limit: Limit, *, exact: bool = True, scales: bool = True,
    problems: st.SearchStrategy[WeightedProblem] | None = None, max_examples: int = 50, seed: int | None = 0,
) -> tuple[str, ...]:  # fmt: skip
    """Check the decomposer of a structured form on many small problems.

    Args:
        decomposer: ``decomposer(weight, rank, metric)``, returns an expression of the weight's shape in its dtype.
        limit: (m, n) -> largest rank of the form.
        exact: whether the largest rank reproduces the weight.
        scales: whether four times the weight has four times the error; not so for iterations that stop early.
        problems: domain to search; ``None`` is all of `weighted_problems`.
        max_examples: cases tried a law.
        seed: of the search; ``None`` searches elsewhere every time.

    Returns:
        The names of the laws that hold.

    Raises:
        LawError: at the first broken law, with the smallest failing case.
    """

    @st.composite
    def cases(draw: st.DrawFn) -> RankCase:
        problem = draw(weighted_problems() if problems is None else problems)
        return RankCase(problem, draw(st.integers(0, limit(_shape(problem.weight)))))

    def largest_rank_reconstructs(decomposer: Decomposer, case: RankCase) -> None:
        """At the largest rank nothing is left in the metric."""
        full = RankCase(case.problem, limit(_shape(case.problem.weight)))
        error, _, allowance = judge(decomposer, full)
        require(error <= allowance, f"expected error 0 within {allowance:.3g} at rank {full.rank}; got {error:.9g}")

    laws: tuple[Law[Decomposer, RankCase], ...] = (
        shape_is_kept, entries_are_finite, inputs_are_unchanged, weight_is_not_aliased, dtype_is_kept,
        zero_gives_zero, never_worse_than_nothing,
        *((largest_rank_reconstructs,) if exact else ()), *((error_scales_with_the_weight,) if scales else ()),
    )  # fmt: skip
    return search_laws(laws, decomposer, cases(), max_examples=max_examples, seed=seed)


def check_order_blind(
    decomposer: Decomposer, *, problems: st.SearchStrategy[WeightedProblem] | None = None, max_examples: int = 50,
    seed: int | None = 0,
) -> tuple[str, ...]:  # fmt: skip
    """Check that a decomposer takes rows and columns in any order: so does low rank, and no network over modes.

    Raises:
        LawError: with a case whose error changes with the order.
    """

    @st.composite
    def cases(draw: st.DrawFn) -> RankCase:
        problem = draw(weighted_problems() if problems is None else problems)
        return RankCase(problem, draw(st.integers(0, min(problem.weight.shape))))

    return search_laws((order_does_not_matter,), decomposer, cases(), max_examples=max_examples, seed=seed)


def order_does_not_matter(decomposer: Decomposer, case: RankCase) -> None:
    """The error of a weight with its rows and columns in another order is the same in the metric in that order."""
    weight, metric = case.problem.weight, case.problem.metric
    rows, columns = (torch.cat([torch.arange(1, size, 2), torch.arange(0, size, 2)]) for size in weight.shape)
    moved = weight[rows][:, columns].contiguous()
    there = Metric(_moved(metric.hessian, columns), _moved(metric.gradient, rows))
    error, _, allowance = judge(decomposer, case)
    other = error_in(there, moved.double() - dense64(decomposer(moved, case.rank, there)))
    require(abs(other - error) <= 2 * allowance, f"expected an error of {error:.9g} in any order; got {other:.9g}")


def never_worse_than_nothing(decomposer: Decomposer, case: RankCase) -> None:
    """The error is at most that of the zero matrix."""
    error, _, allowance = judge(decomposer, case)
    nothing = error_in(case.problem.metric, case.problem.weight.double())
    require(error <= nothing + allowance, f"expected an error of at most {nothing:.9g}; got {error:.9g}")


def _moved(side: Tensor | None, order: Tensor) -> Tensor | None:
    if side is None or side.ndim == 1:
        return None if side is None else side[order]
    return side[order][:, order]


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
