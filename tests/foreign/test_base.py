"""Folders of other tools as bases: read whole, checked against the model, kept bit for bit, compensated."""

import pytest
import torch
from quantized_folder import gptq_folder
from safetensors.torch import save_file

import tnc
from tnc.errors import CheckpointError, ModelError, RecipeError
from tnc.foreign import load_base
from tnc.models.layers import weight_of
from tnc.terms import LowRank, Quantized, Sparse, Sum

transformers = pytest.importorskip("transformers")


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=50, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def batches(seed=0):
    return [torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(seed)) for _ in range(3)]


def test_a_folder_becomes_terms_and_the_rest(tmp_path):
    model = tiny_llama()
    base = load_base(gptq_folder(model, tmp_path / "gptq"))
    assert (base.method, len(base.layers)) == ("gptq", 8)
    assert "model.norm.weight" in base.rest
    assert not any("self_attn" in name for name in base.rest)
    base.check_model(model)
    for name, term in base.layers.items():
        expected = tnc.rtn(weight_of(model.get_submodule(name)).detach(), tnc.IntFormat(4, 16))
        assert torch.equal(term.to_dense(), expected.to_dense())


@pytest.mark.parametrize("fisher", [True, False])
def test_compensation_keeps_the_bits_and_never_hurts(fisher, tmp_path):
    model = tiny_llama()
    base = load_base(gptq_folder(model, tmp_path / "gptq"))
    stats = tnc.calibrate(model, batches(), fisher=fisher)
    small = tnc.compress(model, tnc.recipe("compensate", rank=4), stats=stats, bases=base.layers)
    reports = tnc.ModelReport.of(small).layers
    assert set(reports) == set(base.layers)
    for name, term in base.layers.items():
        operator = small.get_submodule(name).operator
        assert isinstance(operator, Sum) and isinstance(operator.terms[0], Quantized)
        assert torch.equal(operator.terms[0].codes, term.codes)
        assert isinstance(operator.terms[1], LowRank)
        metric = tnc.Metric.full(stats[name]) if not fisher else tnc.Metric.fisher(stats[name])
        weight = weight_of(model.get_submodule(name)).detach().double()
        left = metric.norm(weight - operator.to_dense().double())
        assert left < metric.norm(weight - term.to_dense().double())
    back = tnc.load_checkpoint(tnc.save_checkpoint(small, tmp_path / "small"))
    ids = batches(5)[0]
    assert torch.equal(back(ids).logits, small(ids).logits)


def test_pruned_models_are_sparse_bases(tmp_path):
    model = tiny_llama()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    pruned = [k for k in state if "mlp" in k]
    for key in pruned:
        quads = state[key].unflatten(1, (-1, 4))
        keep = quads.abs().topk(2, -1).indices
        state[key] = torch.zeros_like(quads).scatter(-1, keep, quads.gather(-1, keep)).flatten(1)
    (tmp_path / "pruned").mkdir()
    save_file(state, tmp_path / "pruned" / "model.safetensors")
    (tmp_path / "pruned" / "config.json").write_text("{}")
    base = load_base(tmp_path / "pruned")
    assert base.method == "sparse"
    assert {f"{name}.weight" for name in base.layers} == set(pruned)
    for name, term in base.layers.items():
        assert isinstance(term, Sparse)
        assert torch.equal(term.to_dense(), state[f"{name}.weight"])
    small = tnc.compress(model, tnc.recipe("compensate", rank=2), batches(), bases=base.layers)
    assert all(r["relative_error"] < 1 for r in tnc.ModelReport.of(small).layers.values())


def test_folders_that_cannot_be_read(tmp_path):
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=r"layer 'model.layers.0.self_attn.k_proj' of .* lacks qzeros"):
        load_base(gptq_folder(model, tmp_path / "lacks", drop=("qzeros",)))
    path = gptq_folder(model, tmp_path / "gptq")
    config = path / "config.json"
    for text, message in [
        ('{"quantization_config": {"quant_method": "gguf"}}', r"quant_method 'gguf'; expected one of gptq, awq, compr"),
        ('{"quantization_config": {"quant_method": "gptq", "bits": 8}}', r"layer 'model.layers.0.self_attn.k_proj' of"),
        ("{}", "no matrix with 30% zeros"), ("{", "is not JSON"),
    ]:  # fmt: skip
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_base(path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_base(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    with pytest.raises(CheckpointError, match="has no safetensors weights"):
        load_base(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_base(tmp_path / "empty")


def test_a_base_of_another_model_is_refused(tmp_path):
    base = load_base(gptq_folder(tiny_llama(), tmp_path / "gptq"))
    other = tiny_llama()
    other.model.norm.weight.data *= 2
    with pytest.raises(ModelError, match=r"'model.norm.weight' of the base differs .*the tool rescaled it"):
        base.check_model(other)
    wider = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=50)
    )
    with pytest.raises(ModelError, match=r"holds layer '.*' of shape \(32, 32\); the model has \(64, 64\)"):
        base.check_model(wider)
    with pytest.raises(ModelError, match="none of the 14 selected layers has a base; there are bases of elsewhere"):
        tnc.compress(other, tnc.recipe("compensate", rank=1), bases={"elsewhere": tnc.Dense(torch.ones(1, 1))})


def test_recipes_that_quantize_do_not_go_with_a_base():
    with pytest.raises(RecipeError, match="does not take bits"):
        tnc.recipe("compensate", rank=1, bits=4)
