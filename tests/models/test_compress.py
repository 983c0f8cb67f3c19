"""The driver end to end on tiny random transformers: calibrate, compress, save, load, same logits."""

import copy

import pytest
import torch
from torch import nn

import tnc
from tnc.decompose import LowRankStage, Recipe
from tnc.errors import FormatError, NonFiniteError, RankError, StatsError
from tnc.models.layers import select_layers, weight_of

transformers = pytest.importorskip("transformers")


def tiny_llama(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # as transformers loads a model: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return model


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def batches(seed=0, count=6, length=24):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (2, length), generator=generator) for _ in range(count)]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


# An option that a recipe takes gets its value here; a recipe that needs others has a row of its own.
VALUES = {"bits": 3, "group_size": 16, "rank": 4, "blocks": 4}
OWN = {
    "best_at_bits": {"rank": tnc.BitsPerWeight(5)},
    "svd_pooled": {"rank": tnc.BitsPerWeight(20)}, "mpo_pooled": {"rank": tnc.BitsPerWeight(20), "cores": 3},
    "mpo_low_rank": {"rank": tnc.BitsPerWeight(20)}, "mpo": {"rank": 2, "cores": 3},
    "mpo_modes": {"rank": tnc.BitsPerWeight(20), "blocks": 7},  # divides no layer: only the first and the last modes
}  # fmt: skip
ALL = [
    (name, OWN.get(name, {k: VALUES[k] for k in entry.options if k in VALUES})) for name, entry in tnc.RECIPES.items()
]


@pytest.fixture(scope="module")
def calibrated():
    model = tiny_llama()
    return model, tnc.calibrate(model, batches())


@pytest.mark.parametrize(("name", "options"), ALL, ids=[name for name, _ in ALL])
def test_recipe_on_a_model_and_back_from_disk(name, options, calibrated, tmp_path):
    model, stats = calibrated
    before = copy.deepcopy(model.state_dict())
    small = tnc.compress(model, tnc.recipe(name, **options), stats=stats)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    report = tnc.ModelReport.of(small)
    assert len(report.layers) == len(select_layers(model)) == 14
    assert 0 <= report.lower_bound <= report.relative_error * (1 + 1e-6)
    assert report.heldout_relative_error > 0
    assert report.predicted_nats > 0
    ids = batches(seed=9, count=1)[0]
    path = tnc.save_checkpoint(small, tmp_path / "small")
    assert torch.equal(logits(tnc.load_checkpoint(path), ids), logits(small, ids))


def test_pooled_plan_meets_its_budget(calibrated):
    model, stats = calibrated
    report = tnc.ModelReport.of(tnc.compress(model, tnc.recipe("svd_pooled", rank=tnc.BitsPerWeight(16)), stats=stats))
    uniform = tnc.ModelReport.of(tnc.compress(model, tnc.recipe("svd_fisher", rank=tnc.BitsPerWeight(16)), stats=stats))
    assert report.bits_per_weight <= 16
    assert report.predicted_nats < uniform.predicted_nats


def test_conv1d_models_compress(tmp_path):
    model = tiny_gpt2()
    small = tnc.compress(model, tnc.recipe("eora", bits=8, group_size=16, rank=4), batches())
    assert len(tnc.ModelReport.of(small).layers) == 8
    ids = batches(seed=3, count=1)[0]
    assert (logits(small, ids) - logits(model, ids)).abs().max() < 0.05 * logits(model, ids).abs().max()
    assert torch.equal(logits(tnc.load_checkpoint(tnc.save_checkpoint(small, tmp_path / "c")), ids), logits(small, ids))


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_streaming_modes(fisher, sequential):
    model = tiny_llama()
    stages = tnc.recipe("gptq", bits=3, group_size=16)
    small = tnc.compress(model, stages, batches(), fisher=fisher, sequential=sequential)
    report = tnc.ModelReport.of(small)
    assert len(report.layers) == 14
    assert (report.predicted_nats is not None) == fisher


def test_streamed_parallel_equals_precomputed_statistics():
    model = tiny_llama()
    chosen = tnc.recipe("qlr_fisher", bits=3, group_size=16, rank=4)
    streamed = tnc.compress(model, chosen, batches())
    at_once = tnc.compress(model, chosen, stats=tnc.calibrate(model, batches()))
    for a, b in zip(streamed.state_dict().values(), at_once.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sequential_sees_the_compressed_blocks_before():
    model = tiny_llama()
    chosen = tnc.recipe("gptq", bits=2, group_size=16)
    parallel = tnc.compress(model, chosen, batches(), fisher=False)
    sequential = tnc.compress(model, chosen, batches(), fisher=False, sequential=True)
    first, last = (f"model.layers.{i}.mlp.up_proj.0_codes" for i in (0, 1))
    first, last = (name.replace("0_codes", "codes") for name in (first, last))
    assert torch.equal(parallel.state_dict()[first], sequential.state_dict()[first])
    assert not torch.equal(parallel.state_dict()[last], sequential.state_dict()[last])


def test_inplace_changes_the_model_itself():
    model = tiny_llama()
    assert tnc.compress(model, tnc.recipe("rtn", bits=4, group_size=16), inplace=True) is model
    assert isinstance(model.model.layers[0].mlp.up_proj, tnc.FactoredLinear)


def test_forms_that_would_grow_stay_dense_and_say_so(calibrated):
    model, stats = calibrated
    small = tnc.compress(model, tnc.recipe("svd", rank=16), stats=stats, include=["*k_proj", "*q_proj"])
    layers = tnc.ModelReport.of(small).layers  # useful limits: 10 and 16
    for name, layer in layers.items():
        kept = name.endswith("k_proj")
        assert layer["rank"] == (None if kept else 16) and bool(layer["fallbacks"]) == kept
        if kept:
            assert layer["fallbacks"][0] == "rank 16 is above the useful limit mn/(m+n) = 10 of this layer"
            assert "kept dense" in layer["fallbacks"][1]
            assert layer["bits_per_weight"] == 32 and layer["relative_error"] == 0


def test_a_rank_that_no_layer_can_use_is_refused_unless_forced(calibrated):
    model, stats = calibrated
    with pytest.raises(RankError, match=r"recipe 'svd'\(rank=16\) is above the useful limit mn/\(m\+n\) = 10"):
        tnc.compress(model, tnc.recipe("svd", rank=16), stats=stats, include=["*k_proj"])
    forced = tnc.recipe("svd", rank=tnc.Rank(16, forced=True))
    report = tnc.ModelReport.of(tnc.compress(model, forced, stats=stats, include=["*k_proj"]))
    assert all(layer["rank"] == 16 and not layer["fallbacks"] for layer in report.layers.values())
    assert report.bits_per_weight == 48


def test_ranks_of_candidates_are_held_to_the_same_limit(calibrated):
    model, stats = calibrated

    def nested(rank):
        inner = Recipe("inner", (), candidates=(Recipe("low rank", (LowRankStage(rank),)),))
        return Recipe("mine", (), candidates=(inner,))

    with pytest.raises(RankError, match=r"recipe 'mine'\(rank=16\) is above the useful limit mn/\(m\+n\) = 10"):
        tnc.compress(model, nested(16), stats=stats, include=["*k_proj"])
    report = tnc.ModelReport.of(
        tnc.compress(model, nested(tnc.Rank(16, forced=True)), stats=stats, include=["*k_proj"])
    )
    assert all(layer["rank"] == 16 and not layer["fallbacks"] for layer in report.layers.values())


def test_factors_take_the_dtype_asked_for(calibrated):
    model, stats = calibrated
    small = tnc.compress(model, tnc.recipe("svd", rank=4), stats=stats, dtype=torch.float16)
    assert small.model.layers[0].mlp.up_proj.left.dtype == torch.float16


def test_bf16_model(tmp_path):
    small = tnc.compress(tiny_llama(torch.bfloat16), tnc.recipe("eora", bits=4, group_size=16, rank=4), batches())
    ids = batches(seed=3, count=1)[0]
    assert logits(small, ids).dtype == torch.bfloat16
    assert torch.equal(logits(tnc.load_checkpoint(tnc.save_checkpoint(small, tmp_path / "c")), ids), logits(small, ids))


def test_plain_module_without_blocks():
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).eval()
    small = tnc.compress(model, tnc.recipe("rtn", bits=8, group_size=8))
    x = torch.randn(5, 16)
    assert small[2].bias is None
    assert (small(x) - model(x)).abs().max() < 0.05


def test_data_free_recipes_need_no_batches_and_others_say_so():
    model = tiny_llama()
    tnc.compress(model, tnc.recipe("svd", rank=4))
    with pytest.raises(StatsError, match="gptq needs calibration statistics"):
        tnc.compress(model, tnc.recipe("gptq", bits=4, group_size=16))
    with pytest.raises(StatsError, match=r"calibration tokens"):
        tnc.compress(model, tnc.recipe("gptq", bits=4, group_size=16), [])


def test_errors_name_the_layer_and_leave_the_model_alone(calibrated):
    model, stats = calibrated
    broken = copy.deepcopy(model)
    weight_of(broken.model.layers[1].mlp.up_proj).data[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        tnc.compress(broken, tnc.recipe("rtn", bits=4, group_size=16), stats=stats)
    with pytest.raises(FormatError, match=r"group_size=20 does not divide in_features=32"):
        tnc.compress(model, tnc.recipe("rtn", bits=4, group_size=20), stats=stats)
    assert not any(isinstance(m, tnc.FactoredLinear) for m in model.modules())


def test_statistics_of_another_model_are_refused(calibrated):
    model, stats = calibrated
    some = {name: each for name, each in stats.items() if "layers.0" in name}
    for chosen in (tnc.recipe("rtn", bits=4, group_size=16), tnc.recipe("svd_pooled", rank=tnc.BitsPerWeight(20))):
        with pytest.raises(StatsError, match=r"lack 7 of 14 layers, the first is 'model\.layers\.1"):
            tnc.compress(model, chosen, stats=some)
    with pytest.raises(StatsError, match="sequential"):
        tnc.compress(model, tnc.recipe("rtn", bits=4, group_size=16), stats=stats, sequential=True)


def test_dense_targets_get_cross_moments_in_sequential_mode():
    model = tiny_llama()
    found = {
        (name, sequential): tnc.compress(
            model, tnc.recipe(name, bits=2, group_size=16), batches(), fisher=False, sequential=sequential
        )
        for name in ("gptq", "gptaq")
        for sequential in (False, True)
    }
    note = "no cross moment of dense and compressed inputs: the target is the weight itself"
    for key, small in found.items():
        notes = [
            note in layer.report["fallbacks"] for layer in small.modules() if isinstance(layer, tnc.FactoredLinear)
        ]
        assert all(notes) if key == ("gptaq", False) else not any(notes)
    ids = torch.cat(batches())
    dense = logits(model, ids)
    error = {key: float((logits(small, ids) - dense).square().mean()) for key, small in found.items()}
    assert error["gptaq", False] == error["gptq", False]
    assert error["gptaq", True] != error["gptq", True]
