"""Which layers are taken, and the walk over decoder blocks."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tnc.errors import ModelError, NonFiniteError
from tnc.models.blocks import BlockCall, BlockWalk, quiet
from tnc.models.layers import decoder_blocks, is_linear, select_layers, weight_of

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}


def llama(layers=3, **options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**SMALL, **options}))


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, num_local_experts=4, **SMALL))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0))


class Skipping(nn.Module):
    """Every block also sees the embedding: more than hidden states goes from block to block."""

    def __init__(self, extra):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.extra = nn.Embedding(16, 6), extra
        self.blocks = nn.ModuleList(TwoInputs() for _ in range(3))
        self.head = nn.Linear(6, 16)

    def forward(self, ids):
        hidden, carried = self.embedding(ids), None
        for block in self.blocks:
            before = hidden
            hidden = block(hidden, carried if self.extra else None)
            carried = before * 2
        return self.head(hidden if self.extra else torch.tanh(hidden))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden, extra=None):
        return hidden + self.b(torch.tanh(self.a(hidden if extra is None else hidden + extra)))


class TupleBlocks(nn.Module):
    """Blocks that return (hidden, extra), take hidden states by keyword and add to them in place."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, *, states, scale):
            states += torch.tanh(self.a(states * scale))
            return self.b(states), "weights"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(16, 6), nn.Linear(6, 16)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, ids):
        hidden = self.embedding(ids).clone()
        for number, block in enumerate(self.blocks):
            hidden = block(states=hidden, scale=torch.tensor(number + 1.0))[0]
        return self.head(hidden)


def test_llama_layers_in_model_order():
    names = list(select_layers(llama(2)))
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == [f"model.layers.{i}.{part}" for i in range(2) for part in parts]


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_are_left_out(tied):
    model = llama(2, tie_word_embeddings=tied)
    assert not any("lm_head" in name or "embed" in name for name in select_layers(model))


def test_gpt2_weights_are_out_by_in():
    model = gpt2()
    layers = select_layers(model)
    assert len(layers) == 12
    weight = weight_of(layers["transformer.h.0.attn.c_attn"])
    assert weight.shape == (48, 16)
    assert torch.equal(weight, model.transformer.h[0].attn.c_attn.weight.T)
    linear = nn.Linear(3, 5)
    assert weight_of(linear) is linear.weight and is_linear(linear) and not is_linear(nn.LayerNorm(3))


def test_tied_to_embedding_and_shared_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(8, 4)
            self.first, self.again, self.output = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)
            self.again.weight, self.output.weight = self.first.weight, self.embedding.weight

    assert list(select_layers(Model())) == ["first"]


def test_patterns():
    model = llama(3)
    assert len(select_layers(model, include=["*.mlp.*"])) == 9
    assert len(select_layers(model, include=["*.mlp.*", "*.q_proj"])) == 12
    assert len(select_layers(model, exclude=["model.layers.0.*"])) == 14
    assert list(select_layers(model, include=["*.q_proj"], exclude=["*.[01].*"])) == ["model.layers.2.self_attn.q_proj"]


def test_blocks_are_the_outer_list():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    model = nn.Module()
    model.deep = nn.ModuleList([Expert(), Expert()])
    model.few = nn.ModuleList([nn.Linear(4, 4)])
    assert list(decoder_blocks(model)) == ["deep.0", "deep.1"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert decoder_blocks(plain) == {"": plain}
    assert list(select_layers(plain)) == ["0", "1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_errors(argument):
    with pytest.raises(
        ModelError, match=rf"{argument} pattern '\*.qproj' matches none of 21 layers.*layers.0.self_attn"
    ):
        select_layers(llama(), **{argument: ["*.qproj"]})
    with pytest.raises(ModelError, match=rf"{argument}='\*' is one string; expected several.*\['\*'\]"):
        select_layers(llama(), **{argument: "*"})


def test_nothing_to_select_errors():
    with pytest.raises(ModelError, match=r"together leave none of 21 layers.*Exclude fewer"):
        select_layers(llama(), exclude=["*"])
    with pytest.raises(ModelError, match=r"LayerNorm has no nn.Linear or Conv1D.*Pass the language model itself"):
        select_layers(nn.LayerNorm(3))
    with pytest.raises(ModelError, match=r"weight_of was given a LayerNorm; expected nn.Linear or Conv1D"):
        weight_of(nn.LayerNorm(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_names_the_layer(bad):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"layer 'model.layers.1.mlp.up_proj' holds 1 NaN or Inf.*\(3, 2\)"):
        select_layers(model)
    assert len(select_layers(model, exclude=["*.1.mlp.up_proj"])) == 20


def walked(walk, ids):
    calls = walk.calls(ids)
    hidden = calls[0].hidden
    for index, call in enumerate(calls):
        hidden = walk.run(index, hidden, call)
    return walk.tail(ids, hidden)


@pytest.mark.parametrize("build", [llama, mixtral, gpt2, TupleBlocks])
def test_walk_equals_the_forward_exactly(build):
    model = build().eval()
    ids = torch.randint(0, 16, (3, 11), generator=torch.Generator().manual_seed(1))
    walk = BlockWalk(model, ids[:1, :5])
    assert len(walk.blocks) == (2 if build is mixtral else 3) and not walk.whole
    with torch.no_grad():
        expected = model(ids)
        expected = expected if isinstance(expected, torch.Tensor) else expected.logits
        for tokens in (ids, ids[:1], ids[:, :4]):
            direct = expected[: len(tokens), : tokens.shape[1]]
            got = walked(walk, tokens)
            assert torch.equal(got, expected) if tokens is ids else torch.allclose(got, direct, atol=1e-5)


def test_eager_attention_masks_are_walked():
    model = llama(attn_implementation="eager").eval()
    ids = torch.randint(0, 32, (2, 9))
    with torch.no_grad():
        assert torch.equal(walked(BlockWalk(model, ids), ids), model(ids).logits)


@pytest.mark.parametrize("extra", [True, False])
def test_blocks_that_pass_more_are_one_block(extra):
    model = Skipping(extra).eval()
    ids = torch.randint(0, 16, (2, 5))
    walk = BlockWalk(model, ids)
    assert walk.whole == extra
    with torch.no_grad():
        assert torch.equal(walked(walk, ids), model(ids))


def test_blocks_run_out_of_order_or_changed_between_are_one_block():
    class Odd(Skipping):
        def __init__(self, mode):
            super().__init__(False)
            self.mode = mode

        def forward(self, ids):
            hidden = self.embedding(ids)
            for block in list(self.blocks)[:: -1 if self.mode == "reversed" else 1]:
                hidden = block(hidden)
                hidden = torch.relu(hidden) if self.mode == "between" else hidden
            return self.head(hidden)

    ids = torch.randint(0, 16, (2, 5))
    assert BlockWalk(Odd("reversed"), ids).whole and BlockWalk(Odd("between"), ids).whole
    assert not BlockWalk(Odd("plain"), ids).whole


def test_walk_leaves_the_model_as_it_was():
    model = llama().train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    ids = torch.randint(0, 32, (2, 5))
    walk = BlockWalk(model, ids)
    walk.tail(ids, walk.calls(ids)[0].hidden)
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="stop"), quiet(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError("stop")
    assert snapshot(model) == before


def test_an_instance_forward_is_put_back():
    model = llama()
    block = model.model.layers[1]
    block.forward = original = type(block).forward.__get__(block)
    ids = torch.randint(0, 32, (1, 5))
    walk = BlockWalk(model, ids)
    walk.calls(ids)
    assert block.__dict__["forward"] is original and "forward" not in model.model.layers[0].__dict__


def test_calls_without_tensors():
    with pytest.raises(ModelError, match="called without a tensor; expected hidden states"):
        BlockCall.of((3,), {"mask": None})
    with pytest.raises(ModelError, match="a list without a tensor came out of a block"):
        BlockWalk(ReturnsNothing(), torch.zeros(1, 2, dtype=torch.long)).run(
            0, torch.zeros(1), BlockCall(torch.zeros(1), (), {}, None)
        )


class ReturnsNothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, ids):
        return [None]


def snapshot(model):
    """Everything a calibration must not change; tensors by identity and version."""
    return (
        [(name, id(p), p._version, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [
            (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
            for n, m in model.named_modules()
        ],
        getattr(getattr(model, "config", None), "use_cache", None),
    )


def test_of_equal_lists_the_outermost_counts():
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert list(decoder_blocks(model)) == ["layers.0"]


def test_a_head_of_another_name_is_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.embed_out = nn.Linear(4, 4), nn.Linear(4, 8)

        def get_output_embeddings(self):
            return self.embed_out

    assert list(select_layers(Model())) == ["inner"]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_no_cache_while_walking(build):
    model = build()
    assert model.config.use_cache
    ids = torch.randint(0, 16, (1, 5))
    for call in BlockWalk(model, ids).calls(ids):
        values = [*call.args, *call.kwargs.values()]
        assert not any("Cache" in type(value).__name__ for value in values) and call.kwargs.get("use_cache") is not True
