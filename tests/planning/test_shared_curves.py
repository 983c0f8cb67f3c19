"""Options with a shared right factor: what decomposing the group gives, and chosen by all of its layers or none."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import well_conditioned

from tnc.decompose import BitsPerWeight, DenseStage, InputRotation, QuantizeStage
from tnc.decompose.factors import quantize_shared_factors
from tnc.decompose.shared import decompose_shared
from tnc.errors import BudgetError
from tnc.formats import IntFormat
from tnc.planning import (
    Base,
    Choice,
    CurveTable,
    Portfolio,
    Problem,
    Rules,
    input_groups,
    measure_curves,
    measure_groups,
    plan_curves,
    shared_curves,
)
from tnc.stats import LayerStats

BASES = {
    "dense": Base(DenseStage(), compensated=False),
    "none": Base(None),
    "int3": Base(QuantizeStage(IntFormat(3))),
    "int2-turned": Base(QuantizeStage(IntFormat(2)), transforms=(InputRotation(),)),
}
PORTFOLIO = Portfolio(
    BASES, {"16": None, "8": IntFormat(8), "4": IntFormat(4)}, rank_step=2, factor_ranks=(2, 4), shared=True
)


def group(rows, n, seed, *, fisher=True):
    """Layers of different heights that see one input."""
    made = [well_conditioned(m, n, seed + at, fisher=fisher) for at, m in enumerate(rows)]
    first = made[0].stats(heldout=True)
    stats = [first, *(LayerStats(first.inputs, first.heldout, each.stats(heldout=True).gradient) for each in made[1:])]
    return [each.weight.half() for each in made], stats


def shared_options(curves):
    return [{o.choice: o for o in each.options if o.choice.shared} for each in curves]


@settings(max_examples=12)
@given(rows=st.sampled_from([(8, 6), (16, 8, 8), (5, 12)]), seed=st.integers(0, 99), fisher=st.booleans())
def test_options_are_what_decomposing_the_group_gives(rows, seed, fisher):
    weights, stats = group(rows, 24, seed, fisher=fisher)
    found = shared_options(measure_groups(weights, stats, PORTFOLIO))
    assert found[0]
    assert all(each.keys() == found[0].keys() for each in found)
    assert {choice.base for choice in found[0]} <= {"none", "int3"}  # a rotation differs by layer
    for choice in found[0]:
        recipe = PORTFOLIO.recipe(choice)
        assert recipe.shared_inputs
        made = decompose_shared(weights, recipe.stages, stats)
        for option, each in zip([f[choice] for f in found], made, strict=True):
            assert option.bits == each.report.storage_bits
            assert option.heldout_error == pytest.approx(each.report.heldout_relative_error, rel=1e-5, abs=1e-6)
            if fisher:
                assert option.heldout_nats == pytest.approx(each.report.predicted_nats, rel=1e-5, abs=1e-9)
        stored = {id(t): t for each in made for t in each.operator.tensors().values()}
        assert sum(f[choice].bits for f in found) == sum(t.numel() * t.element_size() * 8 for t in stored.values())


def test_sharing_stores_one_right_factor_and_is_never_better_at_one_rank():
    weights, stats = group((12, 12, 12), 24, 0)
    found = measure_groups(weights, stats, PORTFOLIO)
    for at, (curves, shared) in enumerate(zip(found, shared_options(found), strict=True)):
        alone = {o.choice: o for o in measure_curves(weights[at], stats[at], PORTFOLIO).options}
        assert {o.choice for o in curves.options if not o.choice.shared} == alone.keys()
        for choice, option in shared.items():
            own = alone.get(Choice(choice.base, choice.rank, choice.factors))
            if own is None:  # at this rank only sharing pays
                continue
            assert option.bits < own.bits
            if choice.factors == "16":
                assert option.nats >= own.nats * (1 - 1e-3)


def test_shared_options_that_pay_are_measured(monkeypatch):
    """Layers with one row space up to noise: their own terms of the same ranks are known, and bound nothing away."""
    weights, stats = group((24, 24, 24), 24, 0)
    common = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    weights = [(0.02 * w.float() + w.float()[:, :4] @ common).half() for w in weights]
    bounded = measure_groups(weights, stats, PORTFOLIO)
    ranks = {c.rank for c in shared_options(bounded)[0] if (c.base, c.factors) == ("none", "16")}
    assert ranks & {o.choice.rank for o in bounded[0].options if o.choice == Choice("none", o.choice.rank)}
    monkeypatch.setattr(shared_curves, "_least", lambda curves, base: {})
    assert repr(bounded) == repr(measure_groups(weights, stats, PORTFOLIO))


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_options_that_are_not_measured_could_not_have_been_kept(seed, fisher, monkeypatch):
    weights, stats = group((24, 16, 12), 24, seed, fisher=fisher)
    fits, measured = [], []
    monkeypatch.setattr(shared_curves._Group, "_factors", counted(fits, shared_curves._Group._factors))
    monkeypatch.setattr(shared_curves, "quantize_shared_factors", counted(measured, quantize_shared_factors))
    bounded, pruned = measure_groups(weights, stats, PORTFOLIO), len(measured)
    monkeypatch.setattr(shared_curves, "_least", lambda curves, base: {})
    assert repr(bounded) == repr(measure_groups(weights, stats, PORTFOLIO))  # NaN nats are not equal
    assert pruned < len(measured) - pruned  # less than half are rounded
    assert fits  # some shared option was still worth an eigenproblem


def counted(calls, function):
    def call(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    return call


def test_layers_alone_have_nothing_to_share():
    weights, stats = group((12,), 24, 0)
    assert not shared_options(measure_groups(weights, stats, PORTFOLIO))[0]
    assert input_groups({"a": stats[0], "b": stats[0]}) == [["a", "b"]]


@pytest.fixture(scope="module")
def table():
    weights, stats = group((8, 8), 24, 3)
    other, own = group((8,), 24, 9)
    names = ("q", "k")
    small = Portfolio({n: BASES[n] for n in ("dense", "none", "int3")}, {"4": IntFormat(4), "16": None},
                      rank_step=4, max_rank=8, factor_ranks=(2, 4), shared=True)  # fmt: skip
    layers = dict(zip(names, measure_groups(weights, stats, small), strict=True))
    layers["o"] = measure_groups(other, own, small)[0]
    return CurveTable(layers, small, (names,), 0, "float16", "f" * 64)


def agreeing(table):
    for options in itertools.product(*(layer.options for layer in table.layers.values())):
        q, k = (option.choice for option in options[:2])
        if q == k or not (q.shared or k.shared):
            yield options


def test_plans_share_together_or_not_at_all(table):
    """An independent oracle: every plan in which q and k agree on what they share."""
    plans = list(agreeing(table))
    bits = np.array([sum(o.bits for o in options) for options in plans])
    nats = np.array([sum(o.heldout_nats for o in options) for options in plans])
    chosen = set()
    for bpw in np.linspace(bits.min() / table.elements, 12, 25):
        best = nats[bits <= bpw * table.elements * (1 + 1e-12)].min()
        for exact in (False, True):
            plan = plan_curves(table, BitsPerWeight(float(bpw)), Rules(exact=exact))
            q, k = plan.layers["q"].choice, plan.layers["k"].choice
            assert q == k or not (q.shared or k.shared)
            assert plan.lower_bound <= best * (1 + 1e-6) + 1e-12
            assert plan.value >= best * (1 - 1e-6) - 1e-12
            if exact:
                assert plan.value == pytest.approx(best, rel=1e-6, abs=1e-12)
            chosen.add(q)
    assert any(choice.shared for choice in chosen)


def test_front_knows_what_is_shared(table):
    front = Problem.of(table, (BitsPerWeight(3),), Rules(), 1.0).front()
    least = min(sum(o.bits for o in options) for options in agreeing(table))
    assert front.usage[0] == least


def test_table_of_shared_options_comes_back(table, tmp_path):
    table.save(tmp_path / "curves.safetensors")
    assert repr(CurveTable.load(tmp_path / "curves.safetensors").layers) == repr(table.layers)


@pytest.mark.parametrize("choice", [Choice("int2-turned", 2, "16", shared=True), Choice("int3", 0, "16", shared=True)])
def test_what_cannot_be_shared_is_refused(choice):
    with pytest.raises(BudgetError, match="cannot share a right factor: that takes a rank of at least 1 and a base wi"):
        PORTFOLIO.check(choice)


def test_words():
    assert Choice("int3", 8, "4", shared=True).describe() == "int3 + shared rank 8 @ 4"
    assert Choice("none", 8, shared=True).describe() == "shared rank 8 @ 16"
    again = Portfolio.from_json(PORTFOLIO.to_json())
    assert again == PORTFOLIO
