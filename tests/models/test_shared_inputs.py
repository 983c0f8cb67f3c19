"""One right factor for q/k/v and gate/up in a model: found by their inputs, stored and counted once, kept as one."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import tnc
from tnc.decompose import LowRankStage, Recipe
from tnc.decompose.transforms import InputRotation
from tnc.errors import CheckpointError, RecipeError
from tnc.models.evaluate import bits_per_weight
from tnc.models.sharing import input_groups
from tnc.siblings import part_siblings, sibling_groups
from tnc.ties import distinct_bits

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (12, 24), generator=torch.Generator().manual_seed(0))
    return model, tnc.calibrate(model, [ids])


def compressed(calibrated, **options):
    model, stats = calibrated
    return tnc.compress(model, tnc.recipe("qlr_shared", bits=3, group_size=16, rank=4, **options), stats=stats)


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, tnc.FactoredLinear)}


def common(model, *names):
    """How many distinct tensors the named layers of block 0 hold, and how many all together."""
    block = model.model.layers[0]
    held = [t for name in names for t in block.get_submodule(name).operator.tensors().values()]
    return len({id(t) for t in held}), len(held)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.mark.parametrize("factor_bits", [None, 4])
def test_layers_of_the_same_inputs_hold_one_right_factor(calibrated, factor_bits):
    small = compressed(calibrated, factor_bits=factor_bits)
    parts = 1 if factor_bits is None else 3  # codes, scales and zero points
    moved = copy.deepcopy(small).to(torch.float64)
    moved._apply(torch.clone)  # as a move to another device, every tensor is a new one
    for model in (small, moved):
        for names in (ATTENTION, ("mlp.gate_proj", "mlp.up_proj")):
            distinct, held = common(model, *names)
            assert held - distinct == (len(names) - 1) * parts
        distinct, held = common(model, "self_attn.o_proj", "mlp.down_proj")
        assert held == distinct
    assert not {id(t) for t in small.state_dict(keep_vars=True).values()} & {
        id(t) for t in moved.state_dict(keep_vars=True).values()
    }


@pytest.mark.parametrize("factor_bits", [None, 4])
def test_storage_is_counted_once_and_is_what_the_file_holds(calibrated, factor_bits, tmp_path):
    small = compressed(calibrated, factor_bits=factor_bits)
    report = tnc.ModelReport.of(small)
    total = distinct_bits(layers(small).values())
    assert sum(layer["storage_bits"] for layer in report.layers.values()) == total
    assert report.linear_bytes * 8 == total
    assert report.bits_per_weight == bits_per_weight(small)
    path = tnc.save_checkpoint(small, tmp_path / "small")
    manifest = json.loads((path / "tnc.json").read_text())
    wanted = {key for layer in manifest["layers"].values() for key in layer["tensors"].values()}
    on_disk = 0
    for file in manifest["files"]:
        with safe_open(path / file, framework="pt") as shard:
            found = [shard.get_tensor(key) for key in shard.keys() if key in wanted]  # noqa: SIM118
            on_disk += sum(t.numel() * t.element_size() for t in found)
    assert on_disk * 8 == total
    again = tnc.load_checkpoint(path)
    assert common(again, *ATTENTION) == common(small, *ATTENTION)
    again._apply(torch.clone)
    assert common(again, *ATTENTION) == common(small, *ATTENTION)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)


def test_sharing_stores_less_and_costs_little(calibrated):
    model, stats = calibrated
    shared = tnc.ModelReport.of(compressed(calibrated))
    options = {"bits": 3, "group_size": 16, "rank": 4}
    apart = tnc.ModelReport.of(tnc.compress(model, tnc.recipe("qlr_alternating", **options), stats=stats))
    assert shared.linear_bytes < apart.linear_bytes
    assert apart.predicted_nats < shared.predicted_nats < 1.2 * apart.predicted_nats


def test_layers_without_statistics_or_with_transforms(calibrated):
    model, stats = calibrated
    recipe = Recipe("mine", (LowRankStage(4),), shared_inputs=True)
    alone = tnc.compress(model, recipe)
    assert common(alone, *ATTENTION) == (6, 6)
    with pytest.raises(
        RecipeError, match=r"recipe 'mine' shares right factors and has transforms, which differ by lay"
    ):
        tnc.compress(
            model, Recipe("mine", recipe.stages, shared_inputs=True, transforms=(InputRotation(),)), stats=stats
        )


def test_shared_layers_train_and_compile(calibrated):
    small = compressed(calibrated)
    q, k, _ = (small.model.layers[0].get_submodule(name) for name in ATTENTION)
    x = torch.randn(5, 32)
    (q(x).sum() + k(x).sum()).backward()
    right = q.operator.terms[1].right
    assert right is k.operator.terms[1].right
    assert right.grad is not None
    compiled = torch.compile(lambda x: q(x).sum() + k(x).sum(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), q(x).sum() + k(x).sum())


GROUPS = [[f"model.layers.{i}.{name}" for name in names]
          for i in range(2) for names in (ATTENTION, ("mlp.gate_proj", "mlp.up_proj"))]  # fmt: skip


def test_layers_of_one_input_are_siblings_and_say_so(calibrated, tmp_path):
    model, stats = calibrated
    small = compressed(calibrated)
    assert sibling_groups(small) == GROUPS
    for name, layer in layers(small).items():
        group = next((names for names in GROUPS if name in names), None)
        assert (f"one input for {', '.join(group)}: once for all: R x" in layer.explain()) if group else True
    ids = torch.arange(20).reshape(2, 10)
    path = tnc.save_checkpoint(small, tmp_path / "small")
    again = tnc.load_checkpoint(path)
    assert sibling_groups(again) == GROUPS == sibling_groups(copy.deepcopy(again))
    with torch.no_grad():
        together = small(ids).logits
        assert torch.equal(again(ids).logits, together)
        part_siblings(small)
        torch.testing.assert_close(small(ids).logits, together, rtol=1e-4, atol=1e-5)
    apart = tnc.compress(model, tnc.recipe("rtn", bits=4, group_size=16), stats=stats)
    assert sibling_groups(apart) == GROUPS and "nothing in common" in layers(apart)[GROUPS[0][0]].explain()
    assert sibling_groups(tnc.compress(model, tnc.recipe("rtn", bits=4, group_size=16))) == []
    some = tnc.compress(model, tnc.recipe("rtn", bits=4, group_size=16), stats=stats, exclude=["*k_proj", "*up_proj"])
    assert sibling_groups(some) == [[n for n in names if "k_proj" not in n] for names in GROUPS[::2]]


def test_siblings_in_a_checkpoint_are_checked_and_may_be_missing(calibrated, tmp_path):
    path = tnc.save_checkpoint(compressed(calibrated), tmp_path / "small")
    manifest = json.loads((path / "tnc.json").read_text())
    assert manifest.pop("siblings") == GROUPS
    (path / "tnc.json").write_text(json.dumps(manifest))
    assert sibling_groups(tnc.load_checkpoint(path)) == []
    for wrong in ([["model.layers.0.self_attn.q_proj", "model.norm"]], [["nowhere", "else"]], 3):
        (path / "tnc.json").write_text(json.dumps(manifest | {"siblings": wrong}))
        with pytest.raises(CheckpointError, match=r"the siblings in tnc.json of .* are not those of its layers"):
            tnc.load_checkpoint(path)


def test_layers_that_borrowed_moments_are_nobodys_siblings(calibrated):
    _, stats = calibrated
    names = GROUPS[0]
    noted = {name: replace(stats[name], notes=("no calibration token reached this layer",)) for name in names[:1]}
    assert input_groups({name: stats[name] for name in names} | noted) == [names[1:]]
    assert input_groups(dict.fromkeys(names)) == []
