"""Plans of whole models: what was predicted is what is stored and measured."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_compress import batches, tiny_llama

import tnc
from tnc.decompose import DenseStage, MpoStage, QuantizeStage
from tnc.errors import BudgetError, ModelError, StatsError
from tnc.formats import IntFormat
from tnc.models.layer_scores import scores_alone
from tnc.models.planning import measure_plan
from tnc.models.replan import Replanner
from tnc.planning import (
    AllowedBases,
    AllowedRanks,
    Base,
    Choice,
    CurveTable,
    KeepDense,
    Rules,
    edit,
    plan_curves,
    plan_of,
    shortfalls,
)

PORTFOLIO = tnc.Portfolio(
    {"dense": Base(DenseStage(), compensated=False), "int8": Base(QuantizeStage(IntFormat(8)), compensated=False)}
    | {f"int{b}": Base(QuantizeStage(IntFormat(b, group_size=16))) for b in (4, 3, 2)},
    {"16": None, "4": IntFormat(4)}, rank_step=4, factor_ranks=(4,),
)  # fmt: skip


@pytest.fixture(scope="module")
def calibrated():
    model = tiny_llama()
    stats = tnc.calibrate(model, batches())
    return model, stats, tnc.error_curves(model, stats, PORTFOLIO, dtype=torch.bfloat16)


def compressed(model, stats, plan):
    return tnc.compress(model, plan, stats=stats, dtype=torch.bfloat16)


@pytest.mark.parametrize("budget", [3.4, 4.4, 7.0])
def test_predicted_bits_nats_and_bytes_are_those_of_the_file(calibrated, budget, tmp_path):
    model, stats, curves = calibrated
    plan = tnc.plan(model, stats, tnc.BitsPerWeight(budget), curves=curves)
    small = compressed(model, stats, plan)
    report = tnc.ModelReport.of(small)
    assert report.bits_per_weight == plan.bits_per_weight <= budget
    for name, layer in plan.layers.items():
        assert report.layers[name]["storage_bits"] == layer.bits
        assert report.layers[name]["predicted_nats"] == pytest.approx(layer.nats, rel=1e-5)
    path = tnc.save_checkpoint(small, tmp_path / "small")
    records = json.loads((path / "tnc.json").read_text())["tensors"]
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1, "int64": 8}
    on_disk = sum(torch.Size(r["shape"]).numel() * sizes[r["dtype"]] for r in records.values())
    assert on_disk == plan.bytes
    header = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in path.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in path.glob("*.safetensors")) == on_disk + header
    assert tnc.load_checkpoint(path).tnc_recipe == f"plan(bpw={budget:g})"


@pytest.mark.parametrize("factors", ["16", "4"])
def test_bits_of_shared_right_factors_are_those_of_the_file(calibrated, factors, tmp_path):
    model, stats, _ = calibrated
    bases = {"dense": PORTFOLIO.bases["dense"], "none": Base(None)}
    kinds = {"16": None, factors: PORTFOLIO.factors[factors]}
    portfolio = replace(PORTFOLIO, bases=bases, factors=kinds, shared=True)
    curves = tnc.error_curves(model, stats, portfolio, include=["*.0.*"], dtype=torch.bfloat16)
    plan = tnc.plan(model, stats, tnc.BitsPerWeight(5), curves=curves)
    groups = curves.groups
    choices = {
        name: next(o.choice for o in curves.layers[group[0]].options if o.choice.shared and o.choice.factors == factors)
        for group in groups for name in group
    }  # fmt: skip
    edited = edit(plan, choices)
    small = compressed(model, stats, edited)
    reports = tnc.ModelReport.of(small).layers
    for name in (name for group in groups for name in group):
        option = next(o for o in curves.layers[name].options if o.choice == choices[name])
        assert reports[name]["storage_bits"] == option.bits
        assert reports[name]["predicted_nats"] == pytest.approx(option.heldout_nats, rel=1e-4)
    total = sum(reports[name]["storage_bits"] for name in plan.layers)
    path = tnc.save_checkpoint(small, tmp_path / "small")
    files = sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in path.glob("*.safetensors"))
    assert files == total // 8 + curves.other_bytes
    edited.save(tmp_path / "plan.json")
    assert tnc.Plan.load(tmp_path / "plan.json").layers == edited.layers


def test_matrix_product_operators_are_bases_as_well(calibrated, tmp_path):
    """What their curves say is what is made, also with low rank beside them; the plan's file brings them back."""
    model, stats, _ = calibrated
    bases = {"dense": PORTFOLIO.bases["dense"], "mpo-4": Base(MpoStage(4)), "mpo-8": Base(MpoStage(8, sweeps=1)),
             "mpo-4-int4": Base(MpoStage(4, cores=3, core_format=IntFormat(4)), compensated=False)}  # fmt: skip
    portfolio = replace(PORTFOLIO, bases=bases)
    curves = tnc.error_curves(model, stats, portfolio, include=["*.0.self_attn.*"], dtype=torch.bfloat16)
    name, layer = next(iter(curves.layers.items()))
    assert {option.choice.base for option in layer.options} == set(bases)
    path = tmp_path / "plan.json"
    for base, rank in (("mpo-4", 0), ("mpo-4", 4), ("mpo-8", 0), ("mpo-4-int4", 0)):
        plan_of(curves, {n: Choice(base, rank) for n in curves.layers}).save(path)
        plan = tnc.Plan.load(path)
        assert plan.portfolio == portfolio
        report = tnc.ModelReport.of(compressed(model, stats, plan)).layers[name]
        assert report["storage_bits"] == plan.layers[name].bits
        assert report["predicted_nats"] == pytest.approx(plan.layers[name].nats, rel=1e-4)
    for stage in (MpoStage(tnc.RelativeError(0.1)), MpoStage(4, out_modes=(4, 8), in_modes=(4, 8))):
        with pytest.raises(BudgetError, match="MpoStage of one bond dimension, balanced modes"):
            tnc.error_curves(model, stats, replace(portfolio, bases={"mpo": Base(stage)}))


def test_bytes_budget_is_met_on_disk(calibrated, tmp_path):
    model, stats, curves = calibrated
    limit = curves.other_bytes + 9_000
    plan = tnc.plan(model, stats, tnc.Bytes(limit), curves=curves)
    path = tnc.save_checkpoint(compressed(model, stats, plan), tmp_path / "small")
    files = sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in path.glob("*.safetensors"))
    assert limit - 200 < files == plan.bytes <= limit


def test_error_budget_is_guaranteed(calibrated):
    model, stats, curves = calibrated
    for bound in (0.3, 0.1, 0.02):
        plan = tnc.plan(model, stats, tnc.RelativeError(bound), curves=curves)
        report = tnc.ModelReport.of(compressed(model, stats, plan))
        assert max(layer["heldout_relative_error"] for layer in report.layers.values()) <= bound


@pytest.mark.parametrize("seed", range(12))
def test_no_layer_exceeds_the_error_of_a_random_request(calibrated, seed):
    model, stats, curves = calibrated
    random = torch.Generator().manual_seed(seed)
    bound = float(0.005 * 100 ** torch.rand(1, generator=random))  # 0.5 to 50 %
    drawn = torch.rand(4, generator=random) < 0.4
    every = (KeepDense(("*.o_proj",)), AllowedRanks(()), AllowedRanks((4,)), AllowedBases(("int4", "int2", "dense")))
    rules = Rules(tuple(each for each, taken in zip(every, drawn, strict=True) if taken))
    plan = plan_curves(curves, tnc.RelativeError(bound), rules)
    layers = tnc.ModelReport.of(compressed(model, stats, plan)).layers
    assert max(layer["heldout_relative_error"] for layer in layers.values()) <= bound


def test_error_budget_on_other_statistics_raises(calibrated):
    model, stats, curves = calibrated
    plan = tnc.plan(model, stats, tnc.RelativeError(0.1), curves=curves)
    with pytest.raises(BudgetError, match=r"held-out error of .* above the 0.1 asked"):
        compressed(model, tnc.calibrate(model, batches(seed=5, count=1)), plan)


def test_edited_plan_runs_and_says_that_it_is_over_budget(calibrated):
    model, stats, curves = calibrated
    plan = tnc.plan(model, stats, (tnc.BitsPerWeight(3.5), tnc.RelativeError(0.6)), curves=curves)
    edited = edit(plan, dict.fromkeys(plan.names, Choice("int8")))
    report = tnc.ModelReport.of(compressed(model, stats, edited))
    told = shortfalls(edited, report.layers, total_bytes=0)
    assert len(told) == 1
    assert told[0].startswith("the budget bpw=3.5 is not met: it is 8.")


@pytest.mark.parametrize("budget", [tnc.Nats(0.01), tnc.PerplexityIncrease("1%")])
def test_budgets_in_nats_are_met_as_measured(calibrated, budget):
    model, stats, curves = calibrated
    windows = [row for batch in batches(seed=7, count=4, length=60) for row in batch]
    plan = tnc.plan(model, stats, budget, curves=curves, windows=windows, dtype=torch.bfloat16)
    again = tnc.evaluate(compressed(model, stats, plan), windows, reference=model)
    key = "kl" if isinstance(budget, tnc.Nats) else "delta_nats"
    assert plan.measured[key] == pytest.approx(again.to_json()[key], abs=1e-7)
    assert plan.measured[key] <= (budget.value if key == "kl" else budget.nats)
    assert plan.predicted_nats == pytest.approx(plan.measured["kl"])
    assert "measured plans" in plan.notes[0]


def test_layers_measured_alone_are_models_with_one_layer_compressed(calibrated, tmp_path):
    model, stats, curves = calibrated
    windows = [row for batch in batches(seed=7, count=2, length=60) for row in batch]
    plan = plan_curves(curves, tnc.BitsPerWeight(3.4))
    found = measure_plan(model, stats, plan, windows, dtype=torch.bfloat16, alone=True)
    small = compressed(model, stats, plan)
    whole = tnc.evaluate(small, windows, reference=model).kl
    assert found.measured["kl"] == found.predicted_nats == pytest.approx(whole, abs=1e-9)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        one = copy.deepcopy(model)
        one.get_submodule(name).weight.data.copy_(small.get_submodule(name).operator.to_dense())
        scored = tnc.evaluate(one, windows, reference=model).kl
        assert found.layers[name].measured == pytest.approx(scored, rel=1e-3, abs=1e-9)
    blocks = [tuple(name for name in plan.layers if f"layers.{at}." in name) for at in (0, 1)]
    together = scores_alone(model, small, [*blocks, plan.names, ()], windows)
    assert found.measured["blocks_alone"] == pytest.approx(sum(together[:2]), abs=1e-9)
    assert found.measured["layers_alone"] == pytest.approx(sum(layer.measured for layer in found.layers.values()))
    assert together[2:] == [pytest.approx(whole, abs=1e-9), 0.0]
    assert min(together[:2]) > 0
    assert isinstance(model.get_submodule(name), torch.nn.Linear)  # the model itself stays dense
    for given, message in ((["nothing.here"], "dense model has no layer"), (["lm_head.weight"], "dense model has no")):
        with pytest.raises(ModelError, match=message):
            scores_alone(model, small, [given], windows)
    with pytest.raises(ModelError, match="compressed model has no layer"):
        scores_alone(model, torch.nn.Linear(1, 1), [plan.names[:1]], windows)
    found.save(path := tmp_path / "plan.json")
    assert tnc.Plan.load(path).layers == found.layers


def test_measured_budget_out_of_reach(calibrated):
    model, stats, curves = calibrated
    windows = [row for batch in batches(seed=7, count=2, length=60) for row in batch]
    with pytest.raises(BudgetError, match=r"no plan met nats=1e-12 .* as measured|below the smallest reachable"):
        tnc.plan(model, stats, tnc.Nats(1e-12), curves=curves, windows=windows, dtype=torch.bfloat16)


def test_curves_are_cached_and_stale_ones_refused(calibrated, tmp_path):
    model, stats, curves = calibrated
    path = tmp_path / "curves.safetensors"
    first = tnc.error_curves(model, stats, PORTFOLIO, dtype=torch.bfloat16, include=["*.0.*.k_proj"], cache=path)
    again = tnc.error_curves(model, stats, PORTFOLIO, dtype=torch.bfloat16, include=["*.0.*.k_proj"], cache=path)
    assert repr(first.layers) == repr(again.layers)
    name = next(iter(first.layers))
    assert repr(first.layers[name]) == repr(curves.layers[name])
    other = {k: tnc.LayerStats.from_hessian(2 * s.hessian, tokens=s.tokens) for k, s in stats.items()}
    changes = ({"stats": other}, {"model": tiny_llama(seed=1)}, {"portfolio": tnc.Portfolio.default()})
    for change in changes:
        given = {"model": model, "stats": stats, "portfolio": PORTFOLIO, **change}
        with pytest.raises(BudgetError, match="are stale"):
            tnc.error_curves(**given, dtype=torch.bfloat16, include=["*.0.*.k_proj"], cache=path)


def test_groups_are_the_layers_that_see_one_input(calibrated):
    _, _, curves = calibrated
    block = "model.layers.0."
    assert tuple(f"{block}self_attn.{x}_proj" for x in "qkv") in curves.groups
    assert (f"{block}mlp.gate_proj", f"{block}mlp.up_proj") in curves.groups
    plan = plan_curves(curves, tnc.BitsPerWeight(3.3), Rules(fused=True))
    for group in curves.groups:
        assert len({plan.layers[name].choice.base for name in group}) == 1


def test_only_planned_layers_are_touched(calibrated):
    model, stats, _ = calibrated
    curves = tnc.error_curves(model, stats, PORTFOLIO, include=["*.mlp.*"])
    plan = plan_curves(curves, tnc.BitsPerWeight(20), Rules(constraints=(KeepDense(("*.0.*",)),)))
    small = tnc.compress(model, plan, batches())
    assert isinstance(small.model.layers[1].mlp.up_proj, tnc.FactoredLinear)
    assert isinstance(small.model.layers[1].self_attn.q_proj, torch.nn.Linear)
    assert tnc.ModelReport.of(small).layers["model.layers.0.mlp.up_proj"]["relative_error"] == 0


def test_plan_of_another_model_is_refused(calibrated):
    model, stats, curves = calibrated
    plan = tnc.plan(model, stats, tnc.BitsPerWeight(4), curves=curves)
    other = tiny_llama()
    del other.model.layers[1]
    with pytest.raises(ModelError, match="layers that the model lacks"):
        tnc.compress(other, plan, stats=stats)


def test_missing_statistics_are_named(calibrated):
    model, stats, _ = calibrated
    with pytest.raises(StatsError, match=r"lack 7 of 14 layers, the first is 'model.layers.1"):
        tnc.plan(model, {n: s for n, s in stats.items() if "layers.0" in n}, tnc.BitsPerWeight(3))


def test_curve_table_names_its_dtype(calibrated):
    assert isinstance(calibrated[2], CurveTable)
    assert calibrated[2].dtype == "bfloat16"


def test_replanning_spends_what_is_left(calibrated):
    model, _, curves = calibrated
    budget = tnc.BitsPerWeight(4.0)
    way = Replanner(curves, budget)
    first = way.plan
    small = tnc.compress(model, way, batches(), sequential=True, dtype=torch.bfloat16)
    report = tnc.ModelReport.of(small)
    assert report.bits_per_weight == way.plan.bits_per_weight <= 4.0
    assert report.recipe == "replanned(bpw=4)"
    block = [name for name in way.names if ".0." in name]
    assert all(way.plan.layers[name].nats == pytest.approx(first.layers[name].nats, rel=1e-6) for name in block
               if way.plan.layers[name].choice == first.layers[name].choice)  # fmt: skip
    later = [name for name in way.names if ".1." in name]
    assert any(way.plan.layers[name].nats != first.layers[name].nats for name in later)
    with pytest.raises(StatsError, match="pass batches to compress"):
        tnc.compress(model, Replanner(curves, budget))
