"""Plans from error curves: budgets in both directions, constraints, and words that teach."""

import itertools
import json

import numpy as np
import pytest
import torch

from tnc.decompose import BitsPerWeight, DenseStage, QuantizeStage, RelativeError
from tnc.errors import BudgetError, ModelError
from tnc.formats import IntFormat
from tnc.planning import (
    AllowedBases,
    AllowedRanks,
    Base,
    Bytes,
    Choice,
    Clock,
    CurveTable,
    ErrorCurve,
    KeepDense,
    LargestError,
    Latency,
    LatencyTable,
    LayerCurves,
    Nats,
    Option,
    PerplexityIncrease,
    Plan,
    Portfolio,
    Problem,
    Rules,
    Speedup,
    Timing,
    edit,
    plan_curves,
    shortfalls,
)
from tnc.planning.problem import expert_groups, leaders

BASES = {"dense": Base(DenseStage(), compensated=False)} | {
    f"int{b}": Base(QuantizeStage(IntFormat(b))) for b in (8, 4, 3, 2)
}
PORTFOLIO = Portfolio(BASES)
SHAPE = (64, 96)


def table(seed=0, layers=4, *, gradients=True):
    """Curves as real ones look: 6 dB a bit, ranks that help a little."""
    rng = np.random.default_rng(seed)
    made = {}
    for at in range(layers):
        importance, curves = 10.0 ** rng.uniform(-3, -1), []
        for base in BASES:
            bits = 16.0 if base == "dense" else float(base[3:]) + 0.25
            options = []
            for rank in (0, 8, 16) if base in ("int3", "int2") else (0,):
                nats = (
                    0.0 if base == "dense" else importance * 4.0**-bits * 0.8 ** (rank / 8) * rng.lognormal(sigma=0.1)
                )
                stored = int(bits * 64 * 96) + rank * (64 + 96) * 16
                error = float(np.sqrt(nats / importance))
                options.append(
                    Option(Choice(base, rank), stored, *(nats if gradients else float("nan"),) * 2, error, error)
                )
            curves.append(ErrorCurve(base, "16", tuple(options)))
        made[f"block.{at // 2}.{'qk'[at % 2]}"] = LayerCurves(SHAPE, tuple(curves))
    groups = tuple((f"block.{b}.q", f"block.{b}.k") for b in range(layers // 2))
    return CurveTable(made, PORTFOLIO, groups, 5000, "bfloat16", "f" * 64)


def all_plans(curves):
    return itertools.product(*(layer.options for layer in curves.layers.values()))


def test_bits_budget_against_every_plan():
    curves = table()
    for bpw in (2.3, 2.7, 3.4, 4.4, 9):
        plan = plan_curves(curves, BitsPerWeight(bpw))
        best = min(sum(o.heldout_nats for o in p) for p in all_plans(curves)
                   if sum(o.bits for o in p) / curves.elements <= bpw)  # fmt: skip
        assert plan.bits_per_weight <= bpw
        assert plan.lower_bound <= best <= plan.value + 1e-15
        assert plan_curves(curves, BitsPerWeight(bpw), Rules(exact=True)).value == pytest.approx(best)
        assert plan.predicted_nats == pytest.approx(plan.value)
        assert sum(layer.share for layer in plan.layers.values()) == pytest.approx(1)
        assert all(layer.why for layer in plan.layers.values())


def test_few_layers_are_planned_to_the_optimum_unasked(monkeypatch):
    """The greedy choice is seen where no number of layers is few."""
    greedy = 0
    for seed, nats, layers in itertools.product(range(8), (1e-4, 3e-4, 1e-3), (2, 4, 8)):
        curves, budget = table(seed, layers), Nats(nats * layers / 4)
        found, exact = plan_curves(curves, budget), plan_curves(curves, budget, Rules(exact=True))
        assert found.value == exact.value
        assert found.lower_bound == pytest.approx(found.value, rel=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr("tnc.planning.solve.FEW_LAYERS", 0)
            plain = plan_curves(curves, budget)
        assert plain.lower_bound <= found.lower_bound * (1 + 1e-12)
        assert plain.value >= found.value
        greedy += plain.value > found.value
    assert greedy > 0


def test_error_budget_is_the_same_curve_read_the_other_way():
    curves = table(1)
    for nats in (1e-4, 1e-3, 5e-3):
        plan = plan_curves(curves, Nats(nats))
        best = min(sum(o.bits for o in p) for p in all_plans(curves) if sum(o.heldout_nats for o in p) <= nats)
        assert plan.predicted_nats <= nats * (1 + 1e-12)
        assert plan.lower_bound <= best <= plan.storage_bits
    scaled = plan_curves(curves, Nats(1e-3), scale=2.0)
    assert scaled.predicted_nats == pytest.approx(2 * sum(layer.nats for layer in scaled.layers.values()))
    assert scaled.predicted_nats <= 1e-3 * (1 + 1e-12)
    loose = plan_curves(curves, PerplexityIncrease("0.1%"))
    assert loose.predicted_nats <= PerplexityIncrease("0.1%").nats


def test_bytes_count_the_rest_of_the_checkpoint():
    curves = table()
    plan = plan_curves(curves, Bytes(20_000))
    assert plan.bytes <= 20_000
    assert plan.bytes == plan.storage_bits // 8 + 5000


def test_two_hundred_error_requests_are_never_violated():
    rng = np.random.default_rng(0)
    for seed in range(200):
        curves, bound = table(seed % 20), float(10 ** rng.uniform(-4, -0.5))
        plan = plan_curves(curves, RelativeError(bound))
        for name, layer in plan.layers.items():
            fitting = [o for o in curves.layers[name].options if o.heldout_error <= bound]
            assert layer.error <= bound
            assert layer.bits == min(o.bits for o in fitting)


def test_unreachable_error_says_the_smallest():
    curves = table()
    no_dense = Rules(constraints=(AllowedBases(("int8", "int4")),))
    with pytest.raises(BudgetError, match=r"contradict on layer .*: bases int8, int4 and relative error <= 1e-06"):
        plan_curves(curves, RelativeError(1e-6), no_dense)
    without = CurveTable(
        {n: LayerCurves(c.shape, c.curves[1:]) for n, c in curves.layers.items()}, PORTFOLIO, (), 0, "bfloat16", ""
    )
    with pytest.raises(BudgetError, match=r"relative error <= 1e-06; the smallest reachable relative error"):
        plan_curves(without, RelativeError(1e-6))


def test_constraints_compose():
    curves = table()
    rules = Rules(constraints=(KeepDense(("block.0.*",)), AllowedRanks((8,)), LargestError(0.2, ("block.1.*",))))
    plan = plan_curves(curves, BitsPerWeight(10), rules)
    assert [plan.layers[f"block.0.{x}"].choice.base for x in "qk"] == ["dense", "dense"]
    for name in ("block.1.q", "block.1.k"):
        assert plan.layers[name].error <= 0.2
        assert plan.layers[name].choice.rank in (0, 8)
    with pytest.raises(BudgetError, match=r"contradict on layer 'block.0.q': dense block.0.\* and bases int4"):
        plan_curves(curves, BitsPerWeight(10), Rules(constraints=(KeepDense(("block.0.*",)), AllowedBases(("int4",)))))


def test_fused_layers_take_one_base():
    for seed, exact in itertools.product(range(5), (False, True)):
        curves = table(seed)
        plan = plan_curves(curves, BitsPerWeight(3.1), Rules(fused=True, exact=exact))
        free = plan_curves(curves, BitsPerWeight(3.1), Rules(exact=True))
        for first, second in curves.groups:
            assert plan.layers[first].choice.base == plan.layers[second].choice.base
        assert plan.value >= free.value * (1 - 1e-9)
        assert plan.lower_bound <= plan.value


def test_fused_experts_take_one_base():
    curves = table(5, 8)
    names = [*(f"b.0.mlp.experts.gate_up_proj.{e}" for e in range(3)), *(f"b.0.experts.{e}.w1" for e in range(3)),
             "b.0.q", "b.1.experts.2.w1"]  # fmt: skip
    curves = CurveTable(dict(zip(names, curves.layers.values(), strict=True)), PORTFOLIO, (), 0, "bfloat16", "")
    assert expert_groups(names) == [tuple(names[:3]), tuple(names[3:6])]
    plan = plan_curves(curves, BitsPerWeight(3.1), Rules(fused=True))
    for group in expert_groups(names):
        assert len({plan.layers[name].choice.base for name in group}) == 1
    free = plan_curves(curves, BitsPerWeight(3.1))
    assert free.value < plan.value
    assert len({free.layers[name].choice.base for name in names[:3]}) > 1


def test_groups_with_a_layer_in_common_agree_together():
    groups = [("a", "b"), ("c", "d"), ("e", "f"), ("b", "c")]
    found = leaders(groups)
    assert {found[name] for name in "abcd"} == {found["a"]}
    assert found["e"] == found["f"] != found["a"]
    assert leaders(groups[:3]) == {"a": "a", "b": "a", "c": "c", "d": "c", "e": "e", "f": "e"}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            BitsPerWeight(1),
            r"bpw=1 is below the smallest reachable: .* from 2.2500 bits per weight to 16.0000 bits",
        ),
        (BitsPerWeight(17), r"bpw=17 is above the largest option everywhere"),
        (Bytes(100), r"bytes=100 is below .* from [0-9,]+ bytes to [0-9,]+ bytes"),
        (Latency("1ms"), "needs measured times"),
        ((), "at least one budget"),
    ],
)
def test_budgets_out_of_reach_say_the_interval(budget, message):
    with pytest.raises(BudgetError, match=message):
        plan_curves(table(), budget)


def test_without_gradients_the_objective_is_a_proxy_and_says_so():
    curves = table(gradients=False)
    plan = plan_curves(curves, BitsPerWeight(3))
    assert plan.objective == "relative"
    assert plan.predicted_nats is None
    assert "a proxy" in plan.notes[0]
    with pytest.raises(BudgetError, match="measured without gradients; calibrate with fisher=True"):
        plan_curves(curves, Nats(0.1))


def clock(**changes):
    times = {"dense": 8e-3, "int8": 4e-3, "int4": 2e-3, "int3": 3e-3, "int2": 1e-3}
    rows = [Timing(SHAPE, base, "16", 0, n, n * time, "reference") for n in (1, 16) for base, time in times.items()]
    rows += [Timing(SHAPE, base, "16", 16, tokens, (time + 1e-3) * tokens) for tokens in (1, 16)
             for base, time in (("int3", 3e-3), ("int2", 1e-3))]  # fmt: skip
    return Clock(LatencyTable("two cores", rows), **changes)


def test_latency_and_speedup_budgets():
    curves = table()
    plan = plan_curves(curves, Latency("10ms"), Rules(clock=clock()))
    assert sum(layer.seconds for layer in plan.layers.values()) <= 0.010 + 1e-12
    twice = plan_curves(curves, Speedup(2), Rules(clock=clock()))
    assert sum(layer.seconds for layer in twice.layers.values()) <= 0.016 + 1e-12
    both = plan_curves(curves, (BitsPerWeight(3.5), Latency("9ms")), Rules(clock=clock()))
    assert both.bits_per_weight <= 3.5
    assert sum(layer.seconds for layer in both.layers.values()) <= 0.009 + 1e-12
    with pytest.raises(BudgetError, match=r"latency=1ms is below the smallest reachable: .* from 4 ms to 32 ms"):
        plan_curves(curves, Latency("1ms"), Rules(clock=clock()))
    with pytest.raises(BudgetError, match=r"within bits <= .* and error <= "):
        plan_curves(curves, (BitsPerWeight(2.3), Nats(1e-6)), Rules(clock=clock()))


def test_table_interpolates_over_rank_and_tokens_and_knows_its_shapes(tmp_path):
    made = clock().table
    assert made.seconds(SHAPE, Choice("int2", 8), 1) == pytest.approx(1.5e-3)
    assert made.seconds(SHAPE, Choice("int2", 0), 4) == pytest.approx(4e-3)
    assert made.seconds(SHAPE, Choice("int2", 64), 1) == pytest.approx(2e-3)
    with pytest.raises(BudgetError, match=r"has no timing of int2 @ 16 at shape \(8, 8\); measure it with: tnc bench"):
        made.seconds((8, 8), Choice("int2"), 1)
    made.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json").timings == made.timings
    with pytest.raises(BudgetError, match="is no latency table"):
        LatencyTable.load(tmp_path / "nothing.json")


def test_weights_move_the_bits():
    curves = table(3)
    first = next(iter(curves.layers))
    plain = plan_curves(curves, BitsPerWeight(3.3))
    heavy = plan_curves(curves, BitsPerWeight(3.3), Rules(weights={first: 1e4}))
    assert heavy.layers[first].nats <= plain.layers[first].nats


def test_front_holds_every_lagrangian_plan():
    curves = table(2)
    front = Problem.of(curves, (BitsPerWeight(3),), Rules(), 1.0).front()
    for bits, nats in zip(front.usage, front.cost, strict=True):
        plan = plan_curves(curves, BitsPerWeight(bits / curves.elements))
        assert plan.value == pytest.approx(nats)


def test_plan_file_is_read_back_and_edited(tmp_path):
    plan = plan_curves(table(), (BitsPerWeight(3.1), RelativeError(0.3)))
    path = tmp_path / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again.to_json() == plan.to_json()
    assert not again.edited
    fields = json.loads(path.read_text())
    fields["layers"]["block.0.q"] |= {"base": "int4", "rank": 0}
    path.write_text(json.dumps(fields))
    edited = Plan.load(path)
    assert edited.edited != (plan.layers["block.0.q"].choice == Choice("int4"))
    assert edited.layers["block.0.q"].choice == Choice("int4")
    assert "edited" in edit(plan, {"block.0.q": Choice("int8")}).describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base": "int9"},
            "layer 'block.0.q': base 'int9' is not in the portfolio of this plan; expected one of dense",
        ),
        ({"factors": "3"}, "layer 'block.0.q': factor format '3'"),
        ({"rank": 65}, "layer 'block.0.q' has rank 65; expected an integer from 0 to 64"),
        ({"rank": 1.5}, "has rank 1.5"),
        ({"shared": "yes", "rank": 8}, "layer 'block.0.q' has shared 'yes'; expected true or false"),
        ({"shared": True, "rank": 0}, "cannot share a right factor"),
        ({"colour": "red"}, "is no plan of tnc"),
    ],
)
def test_edits_that_mean_nothing(tmp_path, change, message):
    path = tmp_path / "plan.json"
    plan_curves(table(), BitsPerWeight(3)).save(path)
    fields = json.loads(path.read_text())
    fields["layers"]["block.0.q"] |= change
    path.write_text(json.dumps(fields))
    with pytest.raises(BudgetError, match=message):
        Plan.load(path)


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(BudgetError, match="cannot be read"):
        Plan.load(tmp_path / "missing.json")
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(BudgetError, match="is no plan of tnc"):
        Plan.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"format_version": 99}')
    with pytest.raises(BudgetError, match="format_version 99"):
        Plan.load(tmp_path / "x.json")
    with pytest.raises(BudgetError, match="cannot be written"):
        plan_curves(table(), BitsPerWeight(3)).save(tmp_path / "nowhere" / "plan.json")


def test_plan_of_another_model():
    plan = plan_curves(table(), BitsPerWeight(3))
    shapes = dict.fromkeys(plan.layers, SHAPE)
    plan.check_layers(shapes)
    with pytest.raises(ModelError, match=r"1 of 4 layers that the model lacks, the first is 'block.0.q'"):
        plan.check_layers({n: s for n, s in shapes.items() if n != "block.0.q"})
    with pytest.raises(ModelError, match=r"layer 'block.0.q' has shape \(96, 64\); the plan was made for \(64, 96\)"):
        plan.check_layers({**shapes, "block.0.q": (96, 64)})


def test_edits_name_layers_of_the_plan():
    plan = plan_curves(table(), BitsPerWeight(3))
    with pytest.raises(BudgetError, match="layer 'x' is not in the plan"):
        edit(plan, {"x": Choice("int4")})
    with pytest.raises(BudgetError, match="base 'x' is not in the portfolio"):
        edit(plan, {"block.0.q": Choice("x")})


def report(plan, **changes):
    return {name: {"storage_bits": layer.bits, "shape": layer.shape, "predicted_nats": layer.nats,
                   "relative_error": layer.error, "heldout_relative_error": None, **changes}
            for name, layer in plan.layers.items()}  # fmt: skip


def test_shortfalls_are_told():
    budgets = (BitsPerWeight(3.1), Bytes(20_000), Nats(0.1), RelativeError(0.5))
    plan = plan_curves(table(), budgets)
    assert shortfalls(plan, report(plan), total_bytes=plan.bytes) == ()
    told = shortfalls(plan, report(plan, storage_bits=10**6, predicted_nats=1.0, heldout_relative_error=0.6),
                      total_bytes=30_000)  # fmt: skip
    assert [t.split(" is not")[0] for t in told] == [
        "the budget bpw=3.1", "the budget bytes=20000", "the budget nats=0.1", "the budget error=0.5",
    ]  # fmt: skip


def test_recipes_of_choices():
    plan = plan_curves(table(), BitsPerWeight(2.6))
    recipes = plan.recipes_of({name: torch.zeros(0) for name in plan.names}, {}, torch.bfloat16)
    for name, layer in plan.layers.items():
        assert len(recipes[name].stages) == 1 + (layer.choice.rank > 0)
