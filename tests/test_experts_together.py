"""Experts whose factored layers run in one launch a projection: what each layer gives by itself, in every state."""

import copy

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

import transformers

import tnc
from tnc.experts import unfuse_experts
from tnc.formats import IntFormat
from tnc.kernels import Kernel, qlr, table
from tnc.kernels.grouping import GROUPINGS
from tnc.modules import FactoredLinear
from tnc.quant import rtn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the same on a GPU")
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=3, **SMALL),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        num_experts=5, num_experts_per_tok=3, moe_intermediate_size=32, **SMALL
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"], **SMALL
    ),
}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The fused row serves the CPU too, by Triton's interpreter."""
    monkeypatch.setattr(table, "_KERNELS", dict(table._KERNELS))
    table._KERNELS["qlr"] = Kernel("qlr", _refusal, qlr.bind, 99)
    assert "qlr" in GROUPINGS


def _refusal(operator, device, dtype):
    return "no memory to repack" if device.type == "meta" else qlr.refusal(operator)


def build(family="mixtral", *, rank=4):
    """Experts of a compressed block in float16, and the model they are in."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.initializer_range = 0.2
    model = transformers.AutoModelForCausalLM.from_config(config).half().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter)
    (name,) = unfuse_experts(model)
    recipe = tnc.recipe("lorc", bits=4, group_size=32, rank=rank) if rank else tnc.recipe("rtn", bits=4, group_size=32)
    small = tnc.compress(model, recipe, include=["*experts*"])
    return small.get_submodule(name), small


def routed(experts, tokens=9, top=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(experts.down_proj)
    hidden = torch.randn(tokens, 32, generator=generator).half()
    index = torch.rand(tokens, count, generator=generator).topk(top).indices
    return hidden, index, torch.rand(tokens, top, generator=generator).half()


def same(experts, arguments):
    """Together is what the layers give one by one."""
    assert "together\n" in experts.explain(), experts.explain()
    with torch.no_grad():
        got, exact = experts(*arguments).double(), experts._one_by_one(*arguments).double()
    assert (got - exact).norm() <= 4e-3 * exact.norm()
    return got


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_together_is_what_each_layer_gives_alone(family, tokens):
    experts, _ = build(family)
    same(experts, routed(experts, tokens))


def test_without_low_rank_terms_and_with_choices_that_are_no_expert():
    experts, _ = build(rank=0)
    hidden, index, weights = routed(experts)
    index[3:5] = 3
    index[6, 0] = -1
    got = same(experts, (hidden, index, weights))
    assert not got[3:5].any()


def test_nothing_is_held_twice_and_the_state_is_portable(tmp_path):
    experts, model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    together = same(experts, routed(experts))
    storages = {t.untyped_storage().data_ptr() for t in experts.gate_up_proj[0].bound()[1].values()}
    other = {t.untyped_storage().data_ptr() for t in experts.gate_up_proj[1].bound()[1].values()}
    assert storages == other, "the layers' tensors are views of the group's"
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    memory = {tensor.untyped_storage().data_ptr() for name, tensor in after.items() if "experts" in name}
    assert len(memory) == sum("experts" in name for name in after), "each tensor of the state has memory of its own"
    back = tnc.load_checkpoint(tnc.save_checkpoint(model, tmp_path / "small"))
    again = back.get_submodule("model.layers.0.mlp.experts")
    assert torch.equal(same(again, routed(again)), together)


def test_layers_loaded_moved_or_copied_are_grouped_anew():
    experts, _ = build()
    arguments = routed(experts)
    first = same(experts, arguments)
    layer = experts.down_proj[1]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    twin = copy.deepcopy(experts)
    changed = {name: t * 2 if name.endswith("scale") else t for name, t in state.items()}
    layer.load_state_dict(changed)
    assert not torch.equal(same(experts, arguments), first)
    assert torch.equal(same(twin, arguments), first)
    layer.load_state_dict(state)
    assert torch.equal(same(experts.to("cpu"), arguments), first)
    with torch.no_grad():
        factor = next(p for n, p in twin.down_proj[0].named_parameters() if n.endswith("left"))
        factor.mul_(0)
    assert not torch.equal(same(twin, arguments), first), "a parameter changed in place is seen"


def test_gradients_reach_the_factors_and_x():
    experts, _ = build()
    hidden, index, weights = routed(experts)
    inputs = [hidden.requires_grad_(), weights.requires_grad_()]
    wanted = [*inputs, *(p for p in experts.parameters())]
    seed = torch.randn(9, 32, generator=torch.Generator().manual_seed(3)).half()
    got = torch.autograd.grad(experts(hidden, index, weights), wanted, seed, allow_unused=True)
    exact = torch.autograd.grad(experts._one_by_one(hidden, index, weights), wanted, seed, allow_unused=True)
    for mine, theirs in zip(got, exact, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        assert (mine.double() - theirs.double()).norm() <= 1e-2 * theirs.double().norm() + 1e-3


def test_compiles_without_graph_breaks_and_exports():
    experts, _ = build()
    arguments = routed(experts)
    expected = same(experts, arguments)
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        assert (compiled(*arguments).double() - expected).norm() <= 2e-3 * expected.norm()
        exported = torch.export.export(experts, arguments).module()
        assert torch.equal(exported(*arguments).double(), expected)


def test_a_watched_layer_is_called():
    experts, _ = build()
    same(experts, routed(experts))
    seen = []
    handle = experts.gate_up_proj[1].register_forward_hook(lambda *_: seen.append(1))
    experts(*routed(experts))
    assert seen and "watched by hooks" in experts.explain()
    handle.remove()
    same(experts, routed(experts))


def test_why_experts_run_one_at_a_time_is_said():
    experts, _ = build()
    experts.down_proj[0] = torch.nn.Linear(64, 32, bias=False).half()
    assert experts.explain().endswith("not together: not all of its layers are factored")
    experts, _ = build()
    operator = rtn(torch.randn(32, 64), IntFormat(8, group_size=32))
    experts.down_proj[0] = FactoredLinear(operator).half()
    assert experts.explain().endswith("not together: its layers differ in number format or shape")
    experts.down_proj[0] = FactoredLinear(operator, backend="einsum").half()
    assert experts.explain().endswith("its layers run different kernels: einsum, qlr")
    assert "Experts(3): one at a time" in experts.explain()
