"""Laws of functions that change a matrix product operator: refiners in a metric, and rounders to smaller bonds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.metric import Metric
from tnc.networks import add, scale, tt_svd
from tnc.terms import Mpo, dense64
from tnc.testing.harness import Law, require, search_laws
from tnc.testing.mpo_laws import MpoCase, check_mpo_approximation, mode_lists, mpo_cases
from tnc.testing.oracle import storage_rounding
from tnc.testing.problems import WeightedProblem
from tnc.testing.strategies import weighted_problems

Refiner = Callable[[Tensor, Mpo, Metric], Mpo]
Rounder = Callable[[Mpo, int], Mpo]

# Statistics hold float32 products: directions below the root of their rounding are noise.
_NOISE = 1e-6


@dataclass(frozen=True, eq=False)
class RefineCase:
    """A weight in a metric, and an operator to start from."""

    problem: WeightedProblem
    start: Mpo

    def __str__(self) -> str:
        return f"{self.problem}\nstart: modes {self.start.out_modes} x {self.start.in_modes}, bonds {self.start.ranks}"


@st.composite
def refine_cases(draw: st.DrawFn) -> RefineCase:
    """TT-SVDs of weights over one to three sites, in every sort of metric and dtype, padded or not."""
    problem = draw(weighted_problems(scales=(1.0, 1e-3, 1e3)))
    d = draw(st.integers(1, 3))
    modes = draw(mode_lists(problem.weight.shape[0], d)), draw(mode_lists(problem.weight.shape[1], d))
    return RefineCase(problem, tt_svd(problem.weight, *modes, max_rank=draw(st.integers(1, 4))))


def check_mpo_refiner(refiner: Refiner, *, max_examples: int = 50, seed: int | None = 0) -> tuple[str, ...]:
    """Check ``refiner(weight, operator, metric)``, which lowers the error of an operator in a metric.

    Raises:
        LawError: at the first broken law.
    """
    return search_laws(_REFINER_LAWS, refiner, refine_cases(), max_examples=max_examples, seed=seed)


def check_mpo_rounder(rounder: Rounder, *, max_examples: int = 50, seed: int | None = 0) -> tuple[str, ...]:
    """Check ``rounder(operator, max_rank)``, which makes bonds smaller in the Frobenius norm.

    A rounded exact operator is an approximation of the matrix, so the laws of `check_mpo_approximation` come first.

    Raises:
        LawError: at the first broken law.
    """

    def decomposer(weight: Tensor, outs: tuple[int, ...], ins: tuple[int, ...], rank: int) -> Mpo:
        return rounder(tt_svd(weight, outs, ins), rank)

    before = check_mpo_approximation(decomposer, max_examples=max_examples, seed=seed)
    from_cases = search_laws(_ROUNDER_LAWS, rounder, _over_ranked(), max_examples=max_examples, seed=seed)
    return (*before, *from_cases)


def no_error_is_raised(refiner: Refiner, case: RefineCase) -> None:
    """The error in the metric, as stored, is at most that of the start."""
    found, problem = refiner(case.problem.weight, case.start, case.problem.metric), case.problem
    before, after = (problem.metric.norm(problem.weight.double() - dense64(mpo)) for mpo in (case.start, found))
    allowed = _NOISE * problem.metric.norm(problem.weight.double()) + 1e-9 * problem.scale
    require(after <= before + allowed, f"expected an error of at most {before:.9g}; got {after:.9g}")


def the_form_is_kept(refiner: Refiner, case: RefineCase) -> None:
    """Shape, modes, bonds and dtype stay; so neither do the bits change."""
    found = refiner(case.problem.weight, case.start, case.problem.metric)
    require(found.spec() == case.start.spec(), f"expected {case.start.spec()}; got {found.spec()}")
    dtypes = {core.dtype for core in found.cores}
    require(dtypes == {case.start.cores[0].dtype}, f"expected cores in {case.start.cores[0].dtype}; got {dtypes}")


def inputs_are_left_alone(refiner: Refiner, case: RefineCase) -> None:
    """Neither the weight nor the operator given changes, and no core shares the weight's memory."""
    weight, cores = case.problem.weight.clone(), [core.clone() for core in case.start.cores]
    found = refiner(case.problem.weight, case.start, case.problem.metric)
    require(torch.equal(weight, case.problem.weight), "expected the weight unchanged")
    require(all(map(torch.equal, cores, case.start.cores)), "expected the operator given unchanged")
    home = case.problem.weight.untyped_storage().data_ptr()
    require(all(core.untyped_storage().data_ptr() != home for core in found.cores), "expected memory of their own")


def the_best_stays(refiner: Refiner, case: RefineCase) -> None:
    """An operator that is exact is still exact."""
    exact = dense64(case.start)
    wide = Mpo(tuple(core.double() for core in case.start.cores), case.start.features)
    seen = case.problem.metric.norm(exact - dense64(refiner(exact, wide, case.problem.metric)))
    allowed = _NOISE * case.problem.metric.norm(exact) + 1e-9 * case.problem.scale
    require(seen <= allowed, f"expected an error of at most {allowed:.3g}; got {seen:.9g}")


def rounding_twice_changes_nothing(rounder: Rounder, case: MpoCase) -> None:
    """An operator within the limit comes back as the same matrix."""
    once = rounder(_doubled(case), case.rank)
    again = rounder(once, case.rank)
    error = float((dense64(once) - dense64(again)).norm())
    allowed = _NOISE * float(dense64(once).norm()) + 2 * storage_rounding(again)
    require(error <= allowed, f"expected the same matrix; it moved by {error:.9g}")


def what_is_written_twice_is_found(rounder: Rounder, case: MpoCase) -> None:
    """An operator of too large bonds, rounded to those it needs, keeps its matrix."""
    exact = tt_svd(case.weight, case.out_modes, case.in_modes)
    needed = max(exact.ranks)
    error = float((dense64(rounder(_doubled(case), needed)) - dense64(exact)).norm())
    allowed = _NOISE * float(dense64(exact).norm()) + 2 * storage_rounding(exact)
    require(error <= allowed, f"expected the matrix kept with bonds of {needed}; it moved by {error:.9g}")


_REFINER_LAWS: tuple[Law[Refiner, RefineCase], ...] = (
    the_form_is_kept, inputs_are_left_alone, no_error_is_raised, the_best_stays,
)  # fmt: skip
_ROUNDER_LAWS: tuple[Law[Rounder, MpoCase], ...] = (rounding_twice_changes_nothing, what_is_written_twice_is_found)


def _over_ranked() -> st.SearchStrategy[MpoCase]:
    """Without padding, in which an operator may do as it likes."""
    return mpo_cases().filter(lambda c: (prod(c.out_modes), prod(c.in_modes)) == tuple(c.weight.shape))


def _doubled(case: MpoCase) -> Mpo:
    """The weight as an exact operator whose bonds are twice as large as they need be."""
    half = scale(tt_svd(case.weight, case.out_modes, case.in_modes), 0.5)
    return add(half, half)
