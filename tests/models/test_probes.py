"""Layers measured alone: what they cost is what a model with one layer compressed costs, and plans follow it."""

import copy

import pytest
import torch
from test_compress import batches, tiny_llama
from test_planning import PORTFOLIO

import tnc
from tnc.errors import BudgetError
from tnc.models.layers import weight_of
from tnc.models.probes import Probe, probe_layers, probe_plan
from tnc.planning import Choice, CurveTable, LayerCurves, Rules, plan_curves, plan_of, shortfalls


@pytest.fixture(scope="module")
def measured():
    model = tiny_llama()
    stats = tnc.calibrate(model, batches())
    curves = tnc.error_curves(model, stats, PORTFOLIO, include=["*.0.*"], dtype=torch.float32)
    windows = [row for batch in batches() for row in batch][:3]
    return model, stats, curves, windows, probe_layers(model, stats, curves, windows)


def test_probes_are_models_with_one_layer_compressed(measured):
    model, stats, curves, windows, probes = measured
    for name in list(curves.layers)[:3]:
        layer = model.get_submodule(name)
        recipe = PORTFOLIO.recipe(probes[name].choice, torch.float32)
        other = copy.deepcopy(model)
        made = tnc.decompose(weight_of(layer).detach(), recipe.stages, stats=stats[name])
        weight_of(other.get_submodule(name)).data.copy_(made.operator.to_dense())
        scores = tnc.evaluate(other, windows, reference=model)
        assert probes[name].kl == pytest.approx(scores.kl, rel=1e-4, abs=1e-9)
        assert probes[name].predicted == pytest.approx(made.report.predicted_nats, rel=1e-5)
        assert probes[name].weight == pytest.approx(scores.kl / made.report.predicted_nats, rel=1e-3)


def test_a_probe_is_the_plain_option_nearest_to_the_bits_asked(measured):
    _, _, curves, _, probes = measured
    for bits, base in ((2, "int2"), (3, "int2"), (8.2, "int8")):
        for name, layer in probe_plan(curves, bits).layers.items():
            plain = [o for o in curves.layers[name].options if o.choice.rank == 0 and o.choice.base != "dense"]
            nearest = min(abs(o.bits / (layer.shape[0] * layer.shape[1]) - bits) for o in plain)
            assert abs(layer.bits / (layer.shape[0] * layer.shape[1]) - bits) == nearest
            assert bits == 3 or layer.choice == Choice(base)
    assert {name: each.choice for name, each in probes.items()} == {
        name: layer.choice for name, layer in probe_plan(curves).layers.items()
    }


def test_plans_by_probes_predict_them(measured):
    """A plan of what was probed is predicted to cost what the probes measured, added up."""
    _, _, curves, _, probes = measured
    rules = Rules(weights={name: each.weight for name, each in probes.items()})
    plan = plan_of(curves, {name: each.choice for name, each in probes.items()}, rules)
    assert plan.predicted_nats == pytest.approx(sum(each.kl for each in probes.values()))
    assert plan.value == pytest.approx(plan.predicted_nats)
    report = {name: {"storage_bits": layer.bits, "shape": layer.shape, "predicted_nats": layer.nats,
                     "relative_error": layer.error, "heldout_relative_error": None}
              for name, layer in plan.layers.items()}  # fmt: skip
    for budget, told in ((plan.predicted_nats * 1.001, 0), (plan.predicted_nats * 0.999, 1)):
        asked = plan_curves(curves, tnc.Nats(budget), rules)
        assert asked.predicted_nats <= budget * (1 + 1e-9)
        assert len(shortfalls(asked.__class__(plan.layers, PORTFOLIO, (tnc.Nats(budget),), "nats", 0, 0), report,
                              total_bytes=0)) == told  # fmt: skip


def test_heavier_layers_get_more_bits(measured):
    _, _, curves, _, _ = measured
    first = next(iter(curves.layers))
    plain = plan_curves(curves, tnc.BitsPerWeight(3.4))
    heavy = plan_curves(curves, tnc.BitsPerWeight(3.4), Rules(weights={first: 1e3}))
    assert heavy.layers[first].bits >= plain.layers[first].bits
    assert heavy.layers[first].weight == 1e3
    assert heavy.predicted_nats == pytest.approx(sum(e.weight * e.nats for e in heavy.layers.values()))


def test_without_gradients_probes_put_the_proxy_in_nats(measured):
    model, _, _, windows, _ = measured
    stats = tnc.calibrate(model, batches(), fisher=False)
    curves = tnc.error_curves(model, stats, PORTFOLIO, include=["*.0.self_attn.*"], dtype=torch.float32)
    probes = probe_layers(model, stats, curves, windows)
    rules = Rules(weights={name: each.weight for name, each in probes.items()})
    plan = plan_of(curves, {name: each.choice for name, each in probes.items()}, rules)
    assert plan.objective == "relative"
    assert plan.value == pytest.approx(sum(each.kl for each in probes.values()))


def test_probes_are_kept_and_stale_ones_refused(measured, tmp_path):
    model, stats, curves, windows, probes = measured
    cache = tmp_path / "probes.json"
    assert probe_layers(model, stats, curves, windows, cache=cache) == probes
    assert probe_layers(None, stats, curves, windows, cache=cache) == probes  # the model is not looked at
    for changed in ({"windows": windows[:2]}, {"windows": windows, "bits": 4.0}):
        with pytest.raises(BudgetError, match="are stale: they were measured with other curves"):
            probe_layers(model, stats, curves, cache=cache, **changed)
    assert [each.name for each in tmp_path.iterdir()] == [cache.name]
    with pytest.raises(BudgetError, match="could not be written"):
        probe_layers(model, stats, curves, windows, cache=tmp_path / "absent" / "probes.json")
    cache.write_text("{}")
    with pytest.raises(BudgetError, match="are damaged"):
        probe_layers(model, stats, curves, windows, cache=cache)


def test_what_cannot_be_probed_or_planned_is_said(measured):
    _, _, curves, _, _ = measured
    name, layer = next(iter(curves.layers.items()))
    dense = LayerCurves(layer.shape, tuple(each for each in layer.curves if each.base == "dense"))
    only = CurveTable({name: dense}, PORTFOLIO, (), 0, "float32", "")
    with pytest.raises(BudgetError, match="has no option without low rank but dense"):
        probe_plan(only)
    with pytest.raises(BudgetError, match=f"layer '{name}' has the choice none; expected one of the"):
        plan_of(curves, {})
    with pytest.raises(BudgetError, match=r"has the choice int2 \+ rank 3 @ 16; expected one of"):
        plan_of(curves, dict.fromkeys(curves.layers, Choice("int2", 3)))


def test_a_layer_that_costs_nothing_keeps_its_weight():
    assert Probe(Choice("int8"), 0.0, 0.0).weight == 1.0
    assert Probe(Choice("int8"), 0.5, 0.25).weight == 0.5
