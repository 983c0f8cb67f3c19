"""Experts as linear layers: the same model, compressed expert by expert, and back from disk."""

import copy

import pytest
import torch

import tnc
from tnc.errors import ModelError
from tnc.experts import Experts, fused_experts, unfuse_experts
from tnc.models.layers import select_layers

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=3, **SMALL),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8, **SMALL
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, **SMALL
    ),
    # transposed weights, biases, interleaved and clamped gate
    "gpt_oss": lambda: transformers.GptOssConfig(
        num_local_experts=3, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 2, **SMALL
    ),
}


def build(family="mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.initializer_range = 0.3
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter)
    return model


def tokens(rows=3, length=16, seed=0):
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(family):
    model, ids = build(family), tokens()
    before = logits(model, ids)
    names = unfuse_experts(model)
    assert names == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert float((logits(model, ids) - before).abs().max()) <= 1e-4 * float(before.abs().max())
    assert not fused_experts(model)
    assert unfuse_experts(model) == ()


def test_weights_are_shared_until_they_are_replaced():
    model = build()
    stacked = model.model.layers[0].mlp.experts.gate_up_proj
    unfuse_experts(model)
    assert model.get_parameter("model.layers.0.mlp.experts.gate_up_proj.1.weight").data_ptr() == stacked[1].data_ptr()


def test_every_expert_is_a_layer():
    model = build()
    unfuse_experts(model)
    shapes = {n: tuple(m.weight.shape) for n, m in select_layers(model).items() if ".layers.1.mlp." in n}
    up, down = {f"gate_up_proj.{i}": (48, 16) for i in range(3)}, {f"down_proj.{i}": (16, 24) for i in range(3)}
    assert shapes == {f"model.layers.1.mlp.experts.{n}": s for n, s in {**up, **down}.items()}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compressed_and_back_from_disk(family, tmp_path):
    model, ids = build(family), tokens(seed=1)
    unfuse_experts(model)
    small = tnc.compress(model, tnc.recipe("eora", bits=4, group_size=8, rank=2), [tokens(8), tokens(8, seed=2)])
    found = tnc.ModelReport.of(small)
    assert len(found.layers) == 2 * (4 + 2 * 3)
    assert found.predicted_nats > 0
    back = tnc.load_checkpoint(tnc.save_checkpoint(small, tmp_path / "small"))
    assert isinstance(back.model.layers[0].mlp.experts, Experts)
    assert torch.equal(logits(back, ids), logits(small, ids))


def test_attention_alone_leaves_the_experts_as_they_are(tmp_path):
    model, ids = build(), tokens()
    unfuse_experts(model)
    small = tnc.compress(model, tnc.recipe("rtn", bits=4), include=["*self_attn*"])
    back = tnc.load_checkpoint(tnc.save_checkpoint(small, tmp_path / "small"))
    assert torch.equal(logits(back, ids), logits(small, ids))


def test_a_copy_is_independent():
    model = build()
    unfuse_experts(model)
    other = copy.deepcopy(model)
    other.get_parameter("model.layers.0.mlp.experts.down_proj.0.weight").data.zero_()
    assert float(model.get_parameter("model.layers.0.mlp.experts.down_proj.0.weight").detach().abs().max()) > 0


def test_no_token_and_no_choice():
    experts = Experts(build().model.layers[0].mlp.experts)
    nothing = experts(torch.zeros(0, 16), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert nothing.shape == (0, 16)
    unasked = experts(torch.ones(2, 16), torch.full((2, 1), 9), torch.ones(2, 1))
    assert not unasked.any()


def test_experts_computed_in_another_way_are_refused():
    model = build()
    model.model.layers[1].mlp.experts.forward = lambda hidden, index, weights: 2 * hidden
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.experts' \(MixtralExperts\).*Leave them fused"):
        unfuse_experts(model)
    assert len(fused_experts(model)) == 2


def test_unknown_names_are_refused():
    with pytest.raises(ModelError, match=r"'model.norm' is no fused expert module; expected some of model.layers.0"):
        unfuse_experts(build(), ["model.norm"])
