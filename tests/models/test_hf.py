import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tnc.checkpoint import skeleton
from tnc.errors import ModelError
from tnc.models.hf import load_model, load_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loads_float32_unless_asked(folder):
    stored = load_file(folder / "model.safetensors")
    model, same = load_model(folder), load_model(str(folder), dtype="as stored")
    half = load_model(folder, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert not model.training
    for name, tensor in stored.items():
        assert torch.equal(model.state_dict()[name], tensor.float())
        assert torch.equal(same.state_dict()[name], tensor)


def test_loading_is_silent_and_leaves_settings(folder, capfd):
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_model(folder)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_missing_folder(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"no/such does not exist; expected a local folder.*not downloaded"):
            load(tmp_path / "no/such")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json; expected a Hugging Face .*save_pretrained\(folder"):
        load_model(folder)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights; expected model.safetensors or model-00001-of-N"):
        load_model(folder)


def test_pickle_only_is_refused_with_the_way_to_convert(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"only as pickle \(pytorch_model.bin\).* refused; .*save_pretrained\(new_folder"
    ):
        load_model(folder)


def test_tnc_checkpoint_is_told_apart(folder):
    (folder / "tnc.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is a tnc checkpoint, not a dense model; use tnc.load_checkpoint"):
        load_model(folder)


def test_truncated_weights_name_the_folder(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"could not be loaded: SafetensorError.*complete safetensors"):
        load_model(folder)


def test_missing_tensors_are_not_filled_at_random(folder):
    file = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items() if "q_proj" not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors of the model, the first model.layers.0.*q_proj.weight"):
        load_model(folder)


def test_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with pytest.raises(ModelError, match=r"could not be loaded: .*no_such_model"):
        load_model(folder)


def test_without_transformers_the_error_says_how_to_install(folder, monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(skeleton.importlib, "import_module", fail)
    with pytest.raises(ModelError, match=r'run: pip install "tnc\[hf\]"'):
        load_model(folder)


def test_tokenizer(folder):
    with pytest.raises(ModelError, match=r"has no tokenizer files; expected tokenizer.json"):
        load_tokenizer(folder)
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    encoding = load_tokenizer(folder)("abba", add_special_tokens=False, verbose=False)
    assert encoding["input_ids"] == [0, 1, 1, 0]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer of .* could not be loaded: "):
        load_tokenizer(folder)


def test_dtype_option_follows_the_rename():
    class Old:
        __version__ = "4.55.4"

    class New:
        __version__ = "4.56.0.dev0"

    assert skeleton.dtype_option(Old) == "torch_dtype" and skeleton.dtype_option(New) == "dtype"
