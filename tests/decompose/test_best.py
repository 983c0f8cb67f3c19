"""The best of several recipes, layer by layer, within the same bits."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from strategies_matrices import well_conditioned

from tnc.decompose import BitsPerWeight, InputRotation, LowRankStage, QuantizeStage, Recipe, decompose, recipe
from tnc.decompose.best import attempt_by, decompose_by
from tnc.decompose.known_fits import KnownFits
from tnc.decompose.stages import Fitted, Stage
from tnc.errors import BudgetError, RecipeError
from tnc.formats import IntFormat

PROBLEM = well_conditioned(48, 64, 0, fisher=True)


def price(report):
    """What candidates are compared by, by hand."""
    known = (report.predicted_nats, report.heldout_relative_error, report.relative_error)
    return next(value for value in known if value is not None)


def rounded(bits, group=16, method="gptq"):
    return Recipe(f"{method} int{bits} g{group}", (QuantizeStage(IntFormat(bits, group), method=method),))


def of(*candidates, limit=None):
    return Recipe("mine", (), candidates=candidates, limit=None if limit is None else BitsPerWeight(limit))


def test_without_candidates_it_is_decompose():
    mine = recipe("eora", bits=3, group_size=16, rank=4)
    a = decompose_by(PROBLEM.weight, mine, PROBLEM.stats())
    b = decompose(PROBLEM.weight, mine.stages, PROBLEM.stats())
    assert torch.equal(a.operator.to_dense(), b.operator.to_dense())


@pytest.mark.parametrize("fisher", [True, False])
def test_the_winner_has_the_least_price(fisher):
    problem = well_conditioned(48, 64, 1, fisher=fisher)
    trials = [rounded(3), rounded(3, method="rtn"), rounded(3, method="yaqa"), rounded(2)]
    each = [decompose_by(problem.weight, trial, problem.stats()) for trial in trials]
    best = decompose_by(problem.weight, of(*trials), problem.stats())
    assert price(best.report) == min(price(e.report) for e in each)
    assert best.report.choices[-2].startswith("best of 4: ")
    assert all(trial.name in best.report.choices[-1] for trial in trials)


def test_an_earlier_candidate_stays_unless_it_loses_by_the_margin():
    trials = (rounded(3), rounded(3, method="yaqa"))
    first, second = (price(decompose_by(PROBLEM.weight, each, PROBLEM.stats()).report) for each in trials)
    gain = 1 - second / first
    assert gain > 0
    for margin, winner in ((0.0, "yaqa"), (0.9 * gain, "yaqa"), (1.1 * gain, "gptq")):
        best = decompose_by(PROBLEM.weight, replace(of(*trials), margin=margin), PROBLEM.stats())
        assert best.report.choices[-2] == f"best of 2: {winner} int3 g16"


def test_candidates_above_the_limit_do_not_win():
    best = decompose_by(PROBLEM.weight, of(rounded(8), rounded(3), limit=5), PROBLEM.stats())
    assert best.report.bits == 3


def test_candidates_that_do_not_fit_a_layer_are_passed_over():
    best = decompose_by(PROBLEM.weight, of(rounded(4, 48), rounded(3)), PROBLEM.stats())
    assert best.report.bits == 3
    with pytest.raises(BudgetError, match=r"none of 1 candidates of recipe 'mine' fits weight .*group_size=48"):
        decompose_by(PROBLEM.weight, of(rounded(4, 48)), PROBLEM.stats())


@pytest.mark.parametrize("bits", [2.6, 3.3, 4.3, 5.5])
def test_best_at_bits_is_at_or_below_the_single_recipes_at_its_bits(bits):
    found = decompose_by(PROBLEM.weight, recipe("best_at_bits", rank=BitsPerWeight(bits)), PROBLEM.stats())
    assert found.report.bits_per_weight <= bits
    for name in ("rtn", "gptq"):
        for group in (None, 64, 32, 16):
            single = recipe(name, bits=int(bits), group_size=group)
            other = decompose_by(PROBLEM.weight, single, PROBLEM.stats())
            if other.report.bits_per_weight <= bits and group != 16:
                assert price(found.report) <= price(other.report)


def test_best_at_bits_needs_bits():
    with pytest.raises(RecipeError, match=r"needs BitsPerWeight\(b\)"):
        recipe("best_at_bits", rank=4)
    with pytest.raises(RecipeError, match="below every base; ask for more than 2 bits"):
        recipe("best_at_bits", rank=BitsPerWeight(1.5))


@dataclass(frozen=True)
class Counted:
    """A stage that notes every fit."""

    stage: Stage
    fits: list = field(compare=False)

    def fit(self, target) -> Fitted:
        self.fits.append(self.stage)
        return self.stage.fit(target)


@pytest.mark.parametrize("transforms", [(), (InputRotation(),)])
def test_first_stages_that_candidates_have_in_common_are_fitted_once(transforms):
    fits = []
    base = Counted(QuantizeStage(IntFormat(3, 16), method="rtn"), fits)
    stages = [(base, LowRankStage(4)), (base,), (base, LowRankStage(6)), (base, LowRankStage(4))]
    trials = [Recipe(str(at), each, transforms=transforms) for at, each in enumerate(stages)]
    best = decompose_by(PROBLEM.weight, of(*trials), PROBLEM.stats())
    assert len(fits) == 1
    alone = [decompose_by(PROBLEM.weight, trial, PROBLEM.stats()) for trial in trials]
    assert price(best.report) == min(price(each.report) for each in alone)
    assert torch.equal(best.operator.to_dense(), alone[2].operator.to_dense())


def test_sweeps_after_the_first_fit_what_is_left_over():
    fits = []
    base = Counted(QuantizeStage(IntFormat(3, 16), method="rtn"), fits)
    stages = (base, Counted(LowRankStage(4), fits))
    known = KnownFits(PROBLEM.weight, PROBLEM.stats())
    found = [
        attempt_by(PROBLEM.weight, Recipe("mine", stages, sweeps=sweeps), known).measured().report for sweeps in (1, 3)
    ]
    assert len(fits) >= 2 + 2  # a third sweep follows where the second gains enough
    assert fits[:4] == [each.stage for each in (*stages, *stages)]
    assert found[1].relative_error <= found[0].relative_error


def test_a_stage_after_other_stages_is_fitted_anew():
    factors = LowRankStage(4)
    trials = [Recipe(m, (QuantizeStage(IntFormat(3, 16), method=m), factors)) for m in ("rtn", "gptq", "yaqa")]
    known = KnownFits(PROBLEM.weight, PROBLEM.stats())
    for trial in trials:
        found = attempt_by(PROBLEM.weight, trial, known)
        alone = decompose_by(PROBLEM.weight, trial, known.stats)
        assert torch.equal(found.operator.to_dense(), alone.operator.to_dense())


def test_fits_in_another_basis_or_beside_other_bits_are_not_shared():
    fits = []
    base = Counted(QuantizeStage(IntFormat(3, 16), method="rtn"), fits)
    of_bits = LowRankStage(BitsPerWeight(8))
    trials = [
        Recipe("plain", (base,)), Recipe("rotated", (base,), transforms=(InputRotation(),)),
        Recipe("rotated by another seed", (base,), transforms=(InputRotation(seed=1),)),
        Recipe("first", (of_bits, base)), Recipe("before more bits", (of_bits, QuantizeStage(IntFormat(5, 16)))),
    ]  # fmt: skip
    alone = [decompose_by(PROBLEM.weight, trial, PROBLEM.stats()).report.storage_bits for trial in trials]
    fits.clear()
    known = KnownFits(PROBLEM.weight, PROBLEM.stats())
    found = [attempt_by(PROBLEM.weight, trial, known).operator.storage_bits for trial in trials]
    assert len(fits) == 4
    assert found == alone


@pytest.mark.parametrize("seed", range(4))
def test_candidates_that_are_not_refined_could_not_have_won(seed):
    problem = well_conditioned(32, 48, seed, fisher=True)
    trials = [
        Recipe(f"{method} int{bits}", (QuantizeStage(IntFormat(bits, 16), method=method, refine=3),))
        for bits, method in ((3, "yaqa"), (2, "yaqa"), (3, "gptq"), (3, "rtn"))
    ]
    best = decompose_by(problem.weight, of(*trials), problem.stats())
    alone = [decompose_by(problem.weight, trial, problem.stats()) for trial in trials]
    assert price(best.report) == min(price(each.report) for each in alone)
    assert "yaqa int2" in best.report.choices[-1]
    assert best.report.choices[-1].startswith("too far to be refined: ")
    assert best.report.choices[-3].startswith("best of 4: ")


@pytest.mark.parametrize("kept", ["nats", "held-out error", "error", "no statistics"])
def test_the_price_is_that_of_the_report(kept):
    problem = well_conditioned(24, 32, 0, fisher=kept == "nats")
    stats = None if kept == "no statistics" else problem.stats(heldout=kept in ("nats", "held-out error"))
    tried = attempt_by(problem.weight, rounded(3, method="rtn"), KnownFits(problem.weight, stats))
    assert tried.price == pytest.approx(price(tried.measured().report), rel=1e-12)
