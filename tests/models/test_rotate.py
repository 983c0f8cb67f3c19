"""A rotated model computes the same logits, in every Llama-like build, and compresses like any other."""

import copy

import pytest
import torch

import tnc
from tnc.errors import ModelError
from tnc.experts import unfuse_experts
from tnc.models.residual import gain_of, residual_stream, same_logits, untie
from tnc.models.rotate import fuse_gains, rotate_model
from tnc.terms import Hadamard

transformers = pytest.importorskip("transformers")
from rms_models import build, logits, moe  # noqa: E402

BUILDS = {
    "llama": lambda: build("Llama"),
    "tied": lambda: build("Llama", tie_word_embeddings=True),
    "biases": lambda: build("Llama", attention_bias=True, mlp_bias=True),
    "odd width": lambda: build("Llama", hidden_size=26, head_dim=6, num_attention_heads=2, num_key_value_heads=1),
    "qwen2": lambda: build("Qwen2"),
    "qwen3": lambda: build("Qwen3"),
    "gain stored less 1": lambda: build("Gemma", tie_word_embeddings=True),
    "mistral": lambda: build("Mistral"),
    "experts": moe,
    "router and shared names": lambda: build(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
def test_logits_stay_what_they_were(name):
    model = BUILDS[name]()
    before = logits(model)
    rotated = rotate_model(model, seed=3)
    assert float((logits(rotated) - before).abs().max()) <= 1e-4 * float(before.abs().max())
    assert torch.equal(logits(model), before)  # a copy was changed


def test_float64_is_exact_to_the_roundoff_of_float32_norms():
    model = build("Llama").double()
    assert same_logits(model, rotate_model(model), 1e-6) < 1e-6


def test_unfused_experts_rotate_alike():
    fused, apart = moe(), moe()
    unfuse_experts(apart)
    difference = logits(rotate_model(fused)) - logits(rotate_model(apart))
    assert float(difference.abs().max()) < 1e-5


def test_weights_are_those_of_the_rotated_basis():
    model = build("Llama")
    rotated = rotate_model(model, seed=3)
    B = Hadamard.random(24, seed=3).to_dense()
    first, again = model.model.layers[0], rotated.model.layers[0]
    gain = first.input_layernorm.weight.double()
    q = first.self_attn.q_proj.weight.double() * gain @ B.T
    torch.testing.assert_close(again.self_attn.q_proj.weight.double(), q, rtol=0, atol=1e-6)
    down = B @ first.mlp.down_proj.weight.double()
    torch.testing.assert_close(again.mlp.down_proj.weight.double(), down, rtol=0, atol=1e-6)
    A = Hadamard.random(8, seed=4).to_dense()
    v = torch.block_diag(A, A) @ (first.self_attn.v_proj.weight.double() * gain @ B.T)
    torch.testing.assert_close(again.self_attn.v_proj.weight.double(), v, rtol=0, atol=1e-6)
    assert again.input_layernorm.weight.eq(1).all() and rotated.model.norm.weight.eq(1).all()


def test_seeds_differ_and_repeat():
    model = build("Llama")
    a, b, again = (rotate_model(model, s).model.embed_tokens.weight for s in (0, 1, 0))
    assert torch.equal(a, again) and not torch.allclose(a, b)


def test_outliers_of_the_stream_are_spread():
    model = build("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 50
    kurtosis = [
        float((x**4).mean() / (x**2).mean() ** 2)
        for x in (m.model.embed_tokens.weight.detach() for m in (model, rotate_model(model)))
    ]
    assert kurtosis[1] < 0.4 * kurtosis[0]


def test_a_tied_head_gets_its_own_weight():
    model = build("Llama", tie_word_embeddings=True)
    rotated = rotate_model(model)
    assert rotated.lm_head.weight is not rotated.model.embed_tokens.weight
    assert rotated.config.tie_word_embeddings is False and model.config.tie_word_embeddings
    assert not untie(rotated)


def test_inplace_changes_the_model_itself():
    model = build("Llama", tie_word_embeddings=True)
    before = logits(model)
    copied = rotate_model(model, seed=2)
    assert rotate_model(model, seed=2, inplace=True) is model
    assert torch.equal(logits(model), logits(copied)) and not torch.equal(logits(model), before)


def test_a_rotated_model_is_calibrated_compressed_saved_and_loaded(tmp_path):
    model = build("Llama", tie_word_embeddings=True)
    rotated = rotate_model(model)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 50, (2, 24), generator=generator) for _ in range(4)]
    small = tnc.compress(rotated, tnc.recipe("gptq", bits=8, group_size=8), batches)
    assert float((logits(small) - logits(model)).abs().max()) < 0.05 * float(logits(model).abs().max())
    tnc.save_checkpoint(small, tmp_path / "out")
    assert torch.equal(logits(tnc.load_checkpoint(tmp_path / "out")), logits(small))


def test_fusing_gains_alone_is_an_identity():
    model = build("Qwen2")
    fused = copy.deepcopy(model)
    fuse_gains(residual_stream(fused))
    assert same_logits(model, fused, 1e-5) < 1e-5


# refusals


def test_another_build_is_refused_by_name():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))
    with pytest.raises(ModelError, match="has no embedding, output head and final RMS norm called 'norm'"):
        rotate_model(gpt2)
    with pytest.raises(ModelError, match=r"parameter '.*' has no known role in the residual stream"):
        rotate_model(build("Gemma2"))


def test_norms_after_the_layers_are_refused():
    with pytest.raises(ModelError, match=r"has no RMS norm 'input_layernorm'|has no known role"):
        rotate_model(build("Olmo2"))


def test_narrow_weights_are_refused():
    with pytest.raises(ModelError, match=r"rotate_model got weights in torch.bfloat16; expected float32"):
        rotate_model(build("Llama").bfloat16())


def test_a_model_that_does_more_is_caught_by_its_logits():
    model = build("Llama")
    layer = model.model.layers[0]
    layer.mlp.register_forward_hook(lambda module, inputs, output: output.clamp(min=0))  # not a rotation's business
    with pytest.raises(ModelError, match=r"gives other logits after the change, by .* of the largest"):
        rotate_model(model)


def test_a_norm_of_another_kind_is_refused():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((4,), 2.0))

        def forward(self, x):
            return x * self.weight**2

    with pytest.raises(ModelError, match=r"odd \(OddRMSNorm\) is no RMS norm with a gain per feature"):
        gain_of(OddRMSNorm(), "odd")
