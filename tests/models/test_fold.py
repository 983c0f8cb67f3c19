"""Folded scalings change no logit, and the statistics follow."""

import pytest
import torch

import tnc
from tnc.errors import ModelError, StatsError
from tnc.experts import unfuse_experts
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.models.fold import scale_model
from tnc.quant import rtn
from tnc.terms import dense64

pytest.importorskip("transformers")
from rms_models import build, logits, moe

FORMAT = IntFormat(3, group_size=8)


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (2, 20), generator=generator) for _ in range(count)]


def with_outliers(model):
    """The model with two features of every norm 20 times as large, so that scaling pays."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[:2] += 20
            elif name.endswith("up_proj.weight"):
                parameter[:3] *= 10
            elif name.endswith("v_proj.weight"):
                parameter[:2] *= 10
    return model


@pytest.fixture(scope="module")
def scaled():
    model = with_outliers(build("Llama"))
    stats = tnc.calibrate(model, batches())
    return model, stats, scale_model(model, stats, FORMAT, grid=6)


BUILDS = {
    "biases": lambda: build("Llama", attention_bias=True, mlp_bias=True),
    "no groups of heads": lambda: build("Llama", num_key_value_heads=4, hidden_size=32),
    "gain stored less 1": lambda: build("Gemma"),
    "qwen3": lambda: build("Qwen3"),
    "experts": moe,
}


@pytest.mark.parametrize("name", BUILDS)
def test_logits_stay_what_they_were(name):
    model = with_outliers(BUILDS[name]())
    unfuse_experts(model)
    stats = tnc.calibrate(model, batches(), fisher=False)
    found = scale_model(model, stats, FORMAT, grid=3)
    before = logits(model)
    assert any(found.alphas.values())
    assert float((logits(found.model) - before).abs().max()) <= 1e-4 * float(before.abs().max())
    assert torch.equal(logits(model), before)


def test_every_place_of_a_block_is_tried_and_pays(scaled):
    _, _, found = scaled
    places = ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj")
    assert set(found.alphas) == {f"model.layers.{i}.{p}" for i in range(2) for p in places}
    assert all(0 <= a < 1 for a in found.alphas.values()) and max(found.alphas.values()) > 0


def test_statistics_are_those_of_the_scaled_model(scaled):
    _, stats, found = scaled
    again = tnc.calibrate(found.model, batches())
    assert found.stats.keys() == stats.keys()
    for name, moments in again.items():
        scale = float(moments.hessian.abs().max())
        torch.testing.assert_close(found.stats[name].hessian, moments.hessian, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(found.stats[name].inputs.mean_abs, moments.inputs.mean_abs, rtol=1e-3, atol=1e-6)
        G, expected = found.stats[name].gradient.second, moments.gradient.second
        torch.testing.assert_close(G, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_rounding_loses_less_and_stores_nothing_more(scaled):
    def nats_and_bits(model, stats):
        total, bits = 0.0, 0
        for name, known in stats.items():
            weight = model.get_submodule(name).weight.detach()
            term = rtn(weight, FORMAT, stats=known, clip_ratios=(1.0,))
            total += Metric.fisher(known).nats(weight.double() - dense64(term))
            bits += term.storage_bits
        return total, bits

    model, stats, found = scaled
    (plain, bits), (folded, same) = nats_and_bits(model, stats), nats_and_bits(found.model, found.stats)
    assert folded < 0.9 * plain and same == bits


def test_alpha_zero_changes_nothing():
    model = build("Llama")
    stats = tnc.calibrate(model, batches(2), fisher=False)
    found = scale_model(model, stats, FORMAT, grid=1)
    assert set(found.alphas.values()) == {0.0}
    for a, b in zip(model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layers_without_statistics_are_scaled_along():
    model = with_outliers(build("Llama"))
    stats = tnc.calibrate(model, batches(2), fisher=False, include=["*.q_proj"])
    found = scale_model(model, stats, FORMAT, grid=4)
    assert set(found.alphas) == {f"model.layers.{i}.input_layernorm" for i in range(2)}
    layer = tnc.decompose(model.model.layers[0].self_attn.q_proj.weight.detach(), tnc.recipe("rtn", bits=8).stages)
    assert dense64(layer.operator).shape == (32, 24)


def test_refusals():
    model = build("Llama")
    stats = tnc.calibrate(model, batches(2), fisher=False)
    with pytest.raises(ModelError, match=r"scale_model got weights in torch.float16; expected float32"):
        scale_model(build("Llama").half(), stats, FORMAT)
    with pytest.raises(StatsError, match=r"the statistics hold 'elsewhere', which the model has not"):
        scale_model(model, {"elsewhere": next(iter(stats.values()))}, FORMAT)
