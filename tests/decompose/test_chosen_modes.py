"""Modes chosen for a layer: never above the truncated SVD or the balanced operator, and what columns hide is found."""

import pytest
import torch
from hypothesis import given, settings
from strategies_matrices import generator

from tnc.decompose import BitsPerWeight, ChosenModesStage, MpoStage, decompose, recipe, truncated_svd
from tnc.errors import BudgetError, RecipeError
from tnc.metric import Metric
from tnc.terms import Mpo, dense64
from tnc.testing import make_problem, weighted_problems

FEW = settings(max_examples=max(settings.default.max_examples // 5, 6))
PROBLEM = make_problem((24, 16), hessian="full", gradient="full", metric="fisher", seed=3)
SIZE = BitsPerWeight(12)


def error(operator, problem=PROBLEM):
    return problem.metric.norm(problem.weight - dense64(operator))


@given(problem=weighted_problems(dtypes=(torch.float64,), scales=(1.0,)))
@FEW
def test_it_is_never_above_the_truncated_svd_of_its_bits(problem):
    weight = problem.weight
    stage = ChosenModesStage(BitsPerWeight(40), metric=lambda _: problem.metric)
    try:
        found = decompose(weight, (stage,), problem.stats)
    except BudgetError:
        return
    rank = int(40 * weight.numel() // (64 * sum(weight.shape)))
    best = truncated_svd(weight, min(rank, *weight.shape), metric=problem.metric)
    assert found.report.bits_per_weight <= 40
    assert (
        problem.metric.norm(weight - dense64(found.operator))
        <= problem.metric.norm(weight - dense64(best)) + 1e-7 * problem.scale
    )


def test_it_is_the_best_candidate_refined():
    """The oracle: every candidate by `MpoStage` and `truncated_svd`, one by one."""
    stage = ChosenModesStage(SIZE, splits=(2, 4))
    candidates = list(stage.candidates((24, 16)))
    assert candidates[0] == ((24, 1), (1, 16)) and candidates[-1] == MpoStage(1).modes((24, 16))
    assert len(candidates) == len(set(candidates)) == 10
    errors = {}
    for outs, ins in candidates[1:]:
        one = MpoStage(SIZE, sweeps=1, out_modes=outs, in_modes=ins)
        errors[outs, ins] = error(decompose(PROBLEM.weight, (one,), PROBLEM.stats).operator)
    rank = MpoStage(SIZE, out_modes=(24, 1), in_modes=(1, 16)).bond((24, 16), PROBLEM.weight.dtype)
    errors[candidates[0]] = error(truncated_svd(PROBLEM.weight, rank, metric=PROBLEM.metric))
    least = min(errors, key=lambda modes: errors[modes])
    for sweeps in (1, 2):
        found = decompose(PROBLEM.weight, (ChosenModesStage(SIZE, (2, 4), sweeps=sweeps),), PROBLEM.stats)
        assert found.report.choices == (f"modes {least[0]} x {least[1]}, the best of 10",)
        assert isinstance(found.operator, Mpo) and (found.operator.out_modes, found.operator.in_modes) == least
        assert error(found.operator) <= errors[least] * (1 + 1e-6)
    assert sweeps == 2 and error(found.operator) <= errors[least]


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_matrix_that_is_low_rank_after_moving_columns_is_found(side):
    """Of rank 1 as (rows · 4) x (columns / 4): the SVD needs four ranks, the balanced operator more."""
    weight = (torch.randn(24 * 4, 1, generator=generator(1)) @ torch.randn(1, 6, generator=generator(2))).reshape(
        24, 24
    )
    weight = weight if side == "columns" else weight.T.contiguous()
    found = decompose(weight, (ChosenModesStage(BitsPerWeight(32 * 102 / 576)),))
    assert found.report.relative_error < 1e-5 and found.operator.params == 102
    assert decompose(weight, (MpoStage(BitsPerWeight(32 * 102 / 576)),)).report.relative_error > 0.1


def test_the_recipe_and_its_bits():
    built = recipe("mpo_modes", rank=SIZE, blocks=2)
    assert built.stages == (ChosenModesStage(SIZE, splits=(2,)),)
    found = decompose(PROBLEM.weight, built.stages, PROBLEM.stats)
    assert found.report.bits_per_weight <= 12 and found.report.svd_predicted_nats >= found.report.predicted_nats


def test_mistakes_are_explained():
    for wrong in ({"rank": 4}, {"rank": SIZE, "splits": (1,)}, {"rank": SIZE, "sweeps": -1}):
        with pytest.raises(RecipeError, match="expected BitsPerWeight"):
            ChosenModesStage(**wrong)
    with pytest.raises(BudgetError, match="ask for at least"):
        decompose(PROBLEM.weight, (ChosenModesStage(BitsPerWeight(0.01)),), PROBLEM.stats)


def test_without_sweeps_the_starts_compete():
    found = decompose(PROBLEM.weight, (ChosenModesStage(SIZE, sweeps=0, metric=Metric.full),), PROBLEM.stats)
    assert found.report.choices[0].startswith("modes ")
