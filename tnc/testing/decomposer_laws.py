"""Laws of functions ``(weight, rank, metric) -> Expression`` that approximate a weight by a given rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.errors import all_finite
from tnc.metric import Metric
from tnc.terms import Expression, dense64
from tnc.testing.harness import Law, require, search_laws
from tnc.testing.oracle import eckart_young, error_in, largest_gain, storage_rounding
from tnc.testing.problems import WeightedProblem
from tnc.testing.strategies import weighted_problems

Decomposer = Callable[[Tensor, int, Metric], Expression]

# Solvers through a Gram matrix lose directions below sqrt(eps) of the largest, 1.5e-8 in float64; those
# that compute in float32 for narrower weights add a few of its epsilons an inner sum.
_SOLVER = {torch.float64: 1e-6}
_NARROW_SOLVER = 1e-5
# The float64 oracle takes roots of G and H, which are known to eps: sqrt(eps) in the root, a few times.
_ORACLE = 1e-7


@dataclass(frozen=True)
class RankCase:
    """A problem and a rank."""

    problem: WeightedProblem
    rank: int

    def __str__(self) -> str:
        weight = self.problem.weight
        return (
            f"Smallest failing case: rank {self.rank}, weight {tuple(weight.shape)} {weight.dtype}\n"
            f"Rebuild it: problem = {self.problem!r}; decomposer(problem.weight, {self.rank}, problem.metric)"
        )


def check_decomposer(
    decomposer: Decomposer,
    *,
    optimal: bool = False,
    problems: st.SearchStrategy[WeightedProblem] | None = None,
    max_examples: int = 100,
    seed: int | None = 0,
) -> tuple[str, ...]:
    """Check a low-rank decomposer on many small problems.

    Args:
        decomposer: ``decomposer(weight, rank, metric)``, weight (m, n), 0 <= rank <= min(m, n), returns an
            expression of a registered kind, of that shape and of at most that rank, stored in the dtype of
            ``weight``.
        optimal: whether its error must be the Eckart-Young tail in the metric.
        problems: domain to search; ``None`` is all of `weighted_problems`. A decomposer that ignores the metric
            belongs to ``weighted_problems(metrics=("identity",))``: elsewhere more rank may hurt it.
        max_examples: cases tried a law.
        seed: of the search; ``None`` searches elsewhere every time.

    Returns:
        The names of the laws that hold.

    Raises:
        LawError: at the first broken law: its name, what was expected, the smallest failing case.

    Errors are judged in float64 on the tensors as stored, by oracles that share no code with the library's
    solvers; allowances are relative to ``problem.scale``: 1e-6 (1e-5 for weights below float64), plus the
    rounding of the stored factors.
    """
    of_optimum = (error_equals_the_tail,) if optimal else ()
    laws = (*_LAWS_OF_DATA, *of_optimum, *_LAWS_OF_ERROR)
    cases = _cases(weighted_problems() if problems is None else problems)
    return search_laws(laws, decomposer, cases, max_examples=max_examples, seed=seed)


@st.composite
def _cases(draw: st.DrawFn, problems: st.SearchStrategy[WeightedProblem]) -> RankCase:
    problem = draw(problems)
    return RankCase(problem, draw(st.integers(0, min(problem.weight.shape))))


def shape_is_kept(decomposer: Decomposer, case: RankCase) -> None:
    """The result is an expression of the weight's shape."""
    result = _run(decomposer, case)
    require(isinstance(result, Expression), f"expected an Expression; got {type(result).__name__}")
    expected = tuple(case.problem.weight.shape)
    found = (tuple(result.shape), tuple(result.to_dense().shape))
    require(found == (expected, expected), f"expected shape {expected}; got {found[0]}, dense {found[1]}")


def entries_are_finite(decomposer: Decomposer, case: RankCase) -> None:
    """Every stored number is finite."""
    stored = _run(decomposer, case).tensors()
    bad = [name for name, t in stored.items() if t.is_floating_point() and not all_finite(t)]
    require(not bad, f"expected finite stored tensors; {', '.join(bad)} holds NaN or Inf")


def inputs_are_unchanged(decomposer: Decomposer, case: RankCase) -> None:
    """Weight and metric are as before."""
    metric = case.problem.metric
    sides = {"metric.hessian": metric.hessian, "metric.gradient": metric.gradient}
    held = {name: side for name, side in sides.items() if side is not None} | {"weight": case.problem.weight}
    before = {name: tensor.clone() for name, tensor in held.items()}
    _run(decomposer, case)
    changed = [name for name, copy in before.items() if not torch.equal(copy, held[name])]
    require(not changed, f"expected unchanged inputs; {', '.join(changed)} changed in place")


def weight_is_not_aliased(decomposer: Decomposer, case: RankCase) -> None:
    """No stored tensor shares memory with the weight."""
    weight = case.problem.weight
    stored = _run(decomposer, case).tensors()
    home = weight.untyped_storage().data_ptr()
    shared = [name for name, t in stored.items() if t.numel() and t.untyped_storage().data_ptr() == home]
    require(not shared, f"expected tensors of its own; {', '.join(shared)} shares memory with the weight")


def dtype_is_kept(decomposer: Decomposer, case: RankCase) -> None:
    """Factors are stored in the dtype of the weight."""
    expected = case.problem.weight.dtype
    stored = {name: t.dtype for name, t in _run(decomposer, case).tensors().items() if t.is_floating_point()}
    other = {name: dtype for name, dtype in stored.items() if dtype != expected}
    require(not other, f"expected factors in {expected}; got {other}")


def zero_gives_zero(decomposer: Decomposer, case: RankCase) -> None:
    """The zero weight is reproduced exactly."""
    result = decomposer(torch.zeros_like(case.problem.weight), case.rank, case.problem.metric)
    require(not bool(dense64(result).any()), "expected exact zeros for the case's weight times 0")


def error_is_at_least_the_tail(decomposer: Decomposer, case: RankCase) -> None:
    """No matrix of that rank is closer than the Eckart-Young tail."""
    error, tail, allowance = judge(decomposer, case)
    require(
        error >= tail - allowance,
        f"expected an error of at least {tail:.9g}, the optimum for rank {case.rank}; got {error:.9g}, "
        "so the result has a higher rank",
    )


def full_rank_reconstructs(decomposer: Decomposer, case: RankCase) -> None:
    """At full rank nothing is left in the metric."""
    full = RankCase(case.problem, min(case.problem.weight.shape))
    error, _, allowance = judge(decomposer, full)
    message = f"expected error 0 within {allowance:.3g} at rank {full.rank}; got {error:.9g}"
    require(error <= allowance, message)


def rank_never_hurts(decomposer: Decomposer, case: RankCase) -> None:
    """One rank more never increases the error."""
    if case.rank == min(case.problem.weight.shape):
        return
    error, _, allowance = judge(decomposer, case)
    more, _, more_allowance = judge(decomposer, RankCase(case.problem, case.rank + 1))
    require(
        more <= error + allowance + more_allowance,
        f"expected an error of at most {error:.9g}, that of rank {case.rank}, at rank {case.rank + 1}; got {more:.9g}",
    )


def error_scales_with_the_weight(decomposer: Decomposer, case: RankCase) -> None:
    """Four times the weight has four times the error."""
    weight, metric = case.problem.weight, case.problem.metric
    error, _, allowance = judge(decomposer, case)
    larger = decomposer(4 * weight, case.rank, metric)
    scaled = error_in(metric, weight.double() - dense64(larger) / 4)
    bound = allowance + _allowance(case.problem, larger) / 4
    require(
        abs(scaled - error) <= bound,
        f"expected 4 times the error {error:.9g} for 4 times the weight; got 4 times {scaled:.9g}",
    )


def error_equals_the_tail(decomposer: Decomposer, case: RankCase) -> None:
    """The result is optimal in the metric."""
    error, tail, allowance = judge(decomposer, case)
    require(
        error <= tail + allowance,
        f"expected the optimal error {tail:.9g} for rank {case.rank} within {allowance:.3g}; got {error:.9g}",
    )


_LAWS_OF_DATA: tuple[Law[Decomposer, RankCase], ...] = (
    shape_is_kept, entries_are_finite, inputs_are_unchanged, weight_is_not_aliased, dtype_is_kept, zero_gives_zero,
)  # fmt: skip
_LAWS_OF_ERROR: tuple[Law[Decomposer, RankCase], ...] = (
    error_is_at_least_the_tail, full_rank_reconstructs, rank_never_hurts, error_scales_with_the_weight,
)  # fmt: skip


def _run(decomposer: Decomposer, case: RankCase) -> Expression:
    return decomposer(case.problem.weight, case.rank, case.problem.metric)


def judge(decomposer: Decomposer, case: RankCase) -> tuple[float, float, float]:
    """Error of the result as stored, Eckart-Young tail of the rank, and the allowance for rounding."""
    weight, metric = case.problem.weight.clone(), case.problem.metric
    result = _run(decomposer, case)
    tail = float(eckart_young(weight, metric)[case.rank :].norm())
    return error_in(metric, weight.double() - dense64(result)), tail, _allowance(case.problem, result)


def _allowance(problem: WeightedProblem, result: Expression) -> float:
    solver = _SOLVER.get(problem.weight.dtype, _NARROW_SOLVER) * problem.scale
    stored = _ORACLE * float(dense64(result).norm()) + 4 * storage_rounding(result)
    return solver + stored * largest_gain(problem.metric)
