import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tnc.checkpoint import check_output_folder, load_checkpoint, load_layers, read_manifest, save_checkpoint, shards
from tnc.checkpoint import folder as folder_module
from tnc.errors import CheckpointError, ModelError
from tnc.formats import IntFormat
from tnc.modules import FactoredLinear
from tnc.terms import Dense, Diagonal, LowRank, Product, Quantized, Sum

GOLDEN = Path(__file__).parent / "golden" / "v1"


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(rows, columns, format, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    groups = columns // format.group_of(columns)
    codes = torch.randint(format.levels, (rows, columns), generator=generator)
    zero = torch.randint(format.levels, (rows, groups), generator=generator)
    return Quantized.from_codes(codes, normal(rows, groups, seed=seed, dtype=dtype), zero, format)


def q_plus_lr(rows, columns, seed=0):
    low_rank = LowRank(
        normal(rows, 2, seed=seed, dtype=torch.float16), normal(2, columns, seed=seed + 1, dtype=torch.float16)
    )
    return Sum((quantized(rows, columns, IntFormat(3, group_size=4), seed), low_rank))


class Net(nn.Module):
    """Two linear layers around a norm, a tied head, and a buffer that no state dict holds."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(10, 8, dtype=dtype)
        self.up = nn.Linear(8, 12, dtype=dtype)
        self.norm = nn.BatchNorm1d(12, dtype=dtype)
        self.down = nn.Linear(12, 8, bias=False, dtype=dtype)
        self.head = nn.Linear(8, 10, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.register_buffer("angle", torch.linspace(0, 1, 8, dtype=dtype), persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.angle
        return self.head(self.down(self.norm(self.up(x).relu())))


def compressed(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Net(dtype).eval()
    model.up = FactoredLinear.from_linear(model.up, q_plus_lr(12, 8))
    model.down = FactoredLinear.from_linear(model.down, LowRank(normal(8, 3, dtype=dtype), normal(3, 12, dtype=dtype)))
    model.up.report = {"relative_error": 0.5, "fallbacks": ["none"]}
    return model


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(compressed(), tmp_path / "out", base="net", recipe={"name": "eora"})


def manifest_of(path):
    return json.loads((path / "tnc.json").read_text())


def edit(path, change):
    manifest = manifest_of(path)
    change(manifest)
    (path / "tnc.json").write_text(json.dumps(manifest))


def shard_of(path):
    (shard,) = path.glob("*.safetensors")
    return shard


# --- round trip -----------------------------------------------------------------------------------------


def leaves(rows, columns, data):
    kind = data.draw(st.sampled_from(["dense", "low_rank", "int2", "int3", "int4", "int8", "diagonal"]))
    seed = data.draw(st.integers(0, 99))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    if kind == "diagonal" and rows == columns:
        return Diagonal(normal(rows, seed=seed, dtype=dtype))
    if kind == "low_rank":
        rank = data.draw(st.integers(0, min(rows, columns)))
        return LowRank(normal(rows, rank, seed=seed, dtype=dtype), normal(rank, columns, seed=seed + 1, dtype=dtype))
    if kind.startswith("int"):
        form = IntFormat(int(kind[3:]), symmetric=data.draw(st.booleans()))
        return quantized(rows, columns, form, seed, dtype)
    return Dense(normal(rows, columns, seed=seed, dtype=dtype))


def expressions(rows, columns, data, depth=2):
    kind = data.draw(st.sampled_from(["leaf", "sum", "product"])) if depth else "leaf"
    if kind == "sum":
        count = data.draw(st.integers(1, 3))
        return Sum(tuple(expressions(rows, columns, data, depth - 1) for _ in range(count)))
    if kind == "product":
        inner = data.draw(st.integers(1, 5))
        parts = (expressions(rows, inner, data, depth - 1), expressions(inner, columns, data, depth - 1))
        return Product(parts)
    return leaves(rows, columns, data)


@settings(max_examples=max(10, settings().max_examples // 3))  # each example writes and flushes a folder
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), bias=st.booleans(), data=st.data())
def test_round_trip_is_bit_exact_on_random_expressions(tmp_path_factory, rows, columns, bias, data):
    operator = expressions(rows, columns, data)
    layer = FactoredLinear(operator, normal(rows, seed=5, dtype=torch.bfloat16) if bias else None)
    path = save_checkpoint(nn.ModuleDict({"a": layer}), tmp_path_factory.mktemp("law") / "out")
    again = load_layers(path)["a"]
    assert again.operator.spec() == operator.spec()
    assert again.state_dict().keys() == layer.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        other = again.state_dict()[name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape
        assert (
            other.numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(other, tensor)
        )
    full = load_checkpoint(path, model=nn.ModuleDict({"a": nn.Linear(columns, rows, bias=bias)}))
    assert torch.equal(full["a"].operator.to_dense(), operator.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_model_comes_back_bit_for_bit(tmp_path, dtype):
    model = compressed(dtype)
    model.norm.running_mean += 0.25
    path = save_checkpoint(model, tmp_path / "out")
    fresh = Net(dtype)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    again = load_checkpoint(path, model=fresh)
    tokens = torch.arange(10)
    assert torch.equal(again(tokens), model(tokens)) and again(tokens).dtype == dtype
    assert again.head.weight is again.embedding.weight
    assert not again.training and again.up.report == model.up.report and again.down.report is None
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in again.state_dict().items())
    assert isinstance(fresh.up, nn.Linear) and all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_the_model_given_may_have_its_parameters_on_meta(saved):
    fresh = Net()
    for module in fresh.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"))
    again = load_checkpoint(saved, model=fresh)
    tokens = torch.arange(10)
    assert torch.equal(again(tokens), load_checkpoint(saved, model=Net())(tokens))
    nowhere = Net().to("meta")
    with pytest.raises(CheckpointError, match=r"buffers on meta .* the first 'angle'; build it on the CPU"):
        load_checkpoint(saved, model=nowhere)


def test_keys_of_the_shards_are_those_of_the_state_dict(saved):
    model = compressed()
    stored = load_file(shard_of(saved))
    assert stored.keys() == model.state_dict().keys() - {"head.weight"}
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in stored.items())
    assert manifest_of(saved)["tied"] == {"head.weight": "embedding.weight"}


def test_manifest_describes_the_layers(saved):
    manifest = read_manifest(saved)
    assert (manifest["format_version"], manifest["base"], manifest["dtype"]) == (1, "net", "float32")
    assert manifest["recipe"] == {"name": "eora"}
    layer = manifest["layers"]["up"]
    assert layer["shape"] == [12, 8] and layer["bias"] and layer["spec"]["kind"] == "sum"
    assert layer["tensors"]["0.codes"] == "up.0_codes" and layer["report"]["relative_error"] == 0.5
    assert not manifest["layers"]["down"]["bias"] and manifest["layers"]["down"]["report"] is None


def test_dtype_in_the_manifest_is_that_of_the_rest_of_the_model(tmp_path):
    layer = FactoredLinear(LowRank(normal(4, 2, dtype=torch.float16), normal(2, 8, dtype=torch.float16)))
    model = nn.ModuleDict({"a": layer, "norm": nn.LayerNorm(4, dtype=torch.bfloat16)})
    assert read_manifest(save_checkpoint(model, tmp_path / "out"))["dtype"] == "bfloat16"


def test_recipe_noted_on_the_model_and_reports_of_the_caller(tmp_path):
    model = compressed()
    model.tnc_recipe = "eora rank 2"
    path = save_checkpoint(model, tmp_path / "out", reports={"down": {"nats": 0.25}})
    assert read_manifest(path)["recipe"] == "eora rank 2"
    again = load_checkpoint(path, model=Net())
    assert again.tnc_recipe == "eora rank 2"
    assert again.up.report is None and again.down.report == {"nats": 0.25}


def test_shards_are_limited_in_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.write_shards, "__kwdefaults__", {"limit": 330})
    path = save_checkpoint(compressed(), tmp_path / "out")
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.numel() * t.element_size() for t in load_file(f).values()) for f in files]
    assert all(size <= 330 for size in sizes)
    tokens = torch.arange(10)
    assert torch.equal(load_checkpoint(path, model=Net())(tokens), compressed()(tokens))


def test_layers_alone_need_no_transformers(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    layers = load_layers(saved)
    model = compressed()
    assert list(layers) == ["up", "down"] and layers["up"].report == model.up.report
    x = normal(3, 8)
    assert torch.equal(layers["up"](x), model.up(x))


def test_a_layer_at_two_names_is_stored_once(tmp_path):
    layer = FactoredLinear(q_plus_lr(4, 8), normal(4))
    model = nn.ModuleDict({"a": layer, "b": layer})
    path = save_checkpoint(model, tmp_path / "out")
    assert all(key.startswith("a.") for key in load_file(shard_of(path)))
    x = normal(2, 8)
    layers = load_layers(path)
    assert torch.equal(layers["b"](x), layer(x))
    again = load_checkpoint(path, model=nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)}))
    assert again["b"].bias is again["a"].bias and torch.equal(again["b"](x), layer(x))


def test_golden_checkpoint_of_version_1_loads(tmp_path):
    """Written once with the first release of the format; it must load for ever."""
    expected = load_file(GOLDEN / "expected" / "output.safetensors")
    model = load_checkpoint(GOLDEN / "checkpoint", model=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert torch.equal(load_layers(GOLDEN / "checkpoint")["0"].operator.to_dense(), expected["dense"])
    torch.testing.assert_close(model(expected["x"]), expected["y"], rtol=1e-5, atol=1e-6)
    assert model[0].report == {"relative_error": 0.25, "rank": 2}


# --- Hugging Face models --------------------------------------------------------------------------------


def causal_lm(kind, tied, dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 40, "tie_word_embeddings": tied}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=32, attention_bias=True, **ids,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype)
    else:
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, **ids)
        model = transformers.GPT2LMHeadModel._from_config(config, dtype=dtype)
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            rows, columns = layer.weight.shape[::-1] if hasattr(layer, "nf") else layer.weight.shape
            parent, _, child = name.rpartition(".")
            new = FactoredLinear.from_linear(layer, q_plus_lr(rows, columns))
            setattr(model.get_submodule(parent), child, new)
    for parameter in model.parameters():  # biases and norms are constants when fresh
        if parameter.ndim == 1:
            parameter.data += 0.1 * normal(*parameter.shape, dtype=dtype)
    model.generation_config.max_new_tokens = 7
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_lm_gives_the_same_logits_bit_for_bit(tmp_path, kind, tied, dtype):
    model = causal_lm(kind, tied, dtype)
    path = save_checkpoint(model, tmp_path / "out")
    random_state = torch.get_rng_state()
    again = load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    tokens = torch.randint(40, (2, 9))
    assert type(again) is type(model) and torch.equal(again(tokens).logits, model(tokens).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert again.generation_config.max_new_tokens == 7
    assert json.loads((path / "config.json").read_text())["architectures"] == [type(model).__name__]
    held = dict(model.named_buffers())
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, held[name]) and buffer.dtype == held[name].dtype


def test_tokenizer_is_written_beside(tmp_path):
    class Words:
        def save_pretrained(self, save_directory):
            (Path(save_directory) / "tokenizer.json").write_text("{}")

    save_checkpoint(compressed(), tmp_path / "out", tokenizer=Words())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_configs_that_build_nothing(tmp_path, saved, monkeypatch):
    with pytest.raises(CheckpointError, match=r"has no config.json, so .* pass load_checkpoint\(path, model=...\)"):
        load_checkpoint(saved)
    (saved / "config.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(CheckpointError, match=r"no model could be built from .*config.json: ValueError"):
        load_checkpoint(saved)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r'pip install "tnc\[hf\]"'):
        load_checkpoint(saved)


# --- damage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = nn.ModuleDict({"a": FactoredLinear(q_plus_lr(4, 8), normal(4)), "norm": nn.LayerNorm(8)})
    path = save_checkpoint(model, tmp_path_factory.mktemp("damage") / "out")
    return path, shard_of(path).read_bytes()


def load_small(path):
    return load_checkpoint(path, model=nn.ModuleDict({"a": nn.Linear(8, 4), "norm": nn.LayerNorm(8)}))


@given(data=st.data(), flip=st.integers(1, 255))
def test_any_changed_byte_is_detected(small, data, flip):
    path, content = small
    at = data.draw(st.integers(0, len(content) - 1))
    shard_of(path).write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001.safetensors .*'(a|norm)'|'(a|norm)' in shard"):
        load_small(path)
    shard_of(path).write_bytes(content)
    load_small(path)


@given(data=st.data())
def test_any_truncation_is_detected(small, data):
    path, content = small
    length = data.draw(st.integers(0, len(content) - 1))
    shard_of(path).write_bytes(content[:length])
    with pytest.raises(
        CheckpointError, match=rf"is truncated: {length} bytes, expected {len(content)}; it holds layers 'a'"
    ):
        load_small(path)
    with pytest.raises(CheckpointError, match="is truncated"):
        load_layers(path)
    shard_of(path).write_bytes(content)


def test_longer_files_are_refused(saved):
    shard = shard_of(saved)
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(
        CheckpointError, match=r"is too long: .* expected .* it holds layers 'embedding', 'up', 'norm' and 1 more"
    ):
        load_layers(saved)


def test_changed_tensor_names_file_and_layer(saved):
    shard = shard_of(saved)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"tensor '.*' of layer '.*' in shard .*00001.safetensors was changed: .* sha256"
    ):
        load_checkpoint(saved, model=Net())


def test_missing_shard(saved):
    shard_of(saved).unlink()
    with pytest.raises(CheckpointError, match=r"shard .* with layers 'embedding', 'up'.* is missing; copy the whole"):
        load_layers(saved)


def test_missing_tensor_in_manifest_or_shard(saved):
    def forget(manifest):
        del manifest["tensors"]["up.0_codes"]

    def rename(manifest):
        manifest["tensors"]["up.other"] = manifest["tensors"]["up.0_codes"]
        manifest["layers"]["up"]["tensors"]["0.codes"] = "up.other"

    original = (saved / "tnc.json").read_text()
    edit(saved, forget)
    with pytest.raises(CheckpointError, match=r"lists no tensor 'up.0_codes', which layer 'up' needs"):
        load_layers(saved)
    (saved / "tnc.json").write_text(original)
    edit(saved, rename)
    with pytest.raises(CheckpointError, match=r"lacks tensor 'up.other' of layer 'up'; copy it again"):
        load_layers(saved)


def test_shards_outside_the_folder_or_unknown_are_refused(saved):
    def escape(manifest):
        manifest["files"]["../x.safetensors"] = {"bytes": 1, "header_sha256": ""}
        manifest["tensors"]["up.0_codes"]["file"] = "../x.safetensors"

    edit(saved, escape)
    with pytest.raises(CheckpointError, match=r"names the shard '../x.safetensors' but does not describe it"):
        load_layers(saved)


def test_unreadable_shard_with_matching_records(saved):
    shard = shard_of(saved)
    shard.write_bytes(b"\xff" * shard.stat().st_size)

    def accept(manifest):
        manifest["files"][shard.name]["header_sha256"] = shards._header_digest(shard)

    edit(saved, accept)
    with pytest.raises(CheckpointError, match=r"shard .* with layers .* cannot be read: "):
        load_layers(saved)


def test_unknown_kind_names_layer_and_known_kinds(saved):
    edit(saved, lambda m: m["layers"]["down"]["spec"].update(kind="wavelet"))
    with pytest.raises(
        CheckpointError, match=r"layer 'down' of .* cannot be rebuilt: unknown term kind 'wavelet'.*low_rank"
    ):
        load_layers(saved)


def test_tensor_that_a_term_needs_and_the_layer_lacks(saved):
    edit(saved, lambda m: m["layers"]["down"]["tensors"].pop("left"))
    with pytest.raises(CheckpointError, match=r"layer 'down' .* cannot be rebuilt: lacks 'left'"):
        load_layers(saved)


def test_manifest_errors(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; expected a folder with tnc.json"):
        load_layers(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no tnc.json; expected a tnc checkpoint"):
        load_layers(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"empty is a dense model without tnc.json; .* tnc compress .*empty"):
        load_checkpoint(tmp_path / "empty")
    (saved / "tnc.json").write_text('{"format_version": 1,')
    with pytest.raises(CheckpointError, match=r"tnc.json is not JSON \(.*\); copy the checkpoint again"):
        read_manifest(saved)
    (saved / "tnc.json").write_text('{"format_version": 1, "layers": {}, "tied": {}, "dtype": "float32"}')
    with pytest.raises(CheckpointError, match=r"tnc.json lacks files, tensors; copy"):
        read_manifest(saved)


@pytest.mark.parametrize("version", [2, 999])
def test_newer_versions_say_what_is_known(saved, version):
    edit(saved, lambda m: m.update(format_version=version))
    with pytest.raises(CheckpointError, match=rf"format_version {version}; this tnc knows versions up to 1. Upgrade"):
        load_checkpoint(saved, model=Net())


@pytest.mark.parametrize("version", [0, "1", None, True, 1.5])
def test_versions_that_are_none(saved, version):
    edit(saved, lambda m: m.update(format_version=version))
    with pytest.raises(CheckpointError, match=r"has format_version .*; expected an integer from 1 to 1"):
        load_layers(saved)
    (saved / "tnc.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"has format_version None"):
        load_layers(saved)


def test_models_that_do_not_fit(saved):
    wrong = Net()
    wrong.up = nn.Linear(8, 13)
    with pytest.raises(
        CheckpointError, match=r"layer 'up' .* does not fit Net: .*\(12, 8\).*architecture that was saved"
    ):
        load_checkpoint(saved, model=wrong)
    with pytest.raises(CheckpointError, match=r"layer 'up' .* does not fit Sequential"):
        load_checkpoint(saved, model=nn.Sequential(nn.Linear(8, 8)))
    wider = Net()
    wider.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"are not those of Net: .*extra.weight"):
        load_checkpoint(saved, model=wider)


def test_dtype_of_the_manifest_is_checked(tmp_path):
    path = save_checkpoint(causal_lm("llama", True, torch.float32), tmp_path / "out")
    edit(path, lambda m: m.update(dtype="load"))
    with pytest.raises(CheckpointError, match=r"has dtype 'load'; expected a torch dtype such as bfloat16"):
        load_checkpoint(path)


# --- writing whole or not at all ------------------------------------------------------------------------


def test_existing_outputs_are_not_touched(tmp_path, saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    for call in (lambda: save_checkpoint(compressed(), saved), lambda: check_output_folder(saved)):
        with pytest.raises(CheckpointError, match=r"output folder .*out exists; expected a new one.*overwrite=True"):
            call()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"mine exists and is not a tnc checkpoint .* remove it yourself"):
        save_checkpoint(compressed(), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    check_output_folder(tmp_path / "new")
    check_output_folder(saved, overwrite=True)


def test_overwrite_replaces_the_whole_folder(saved):
    (saved / "old.txt").touch()
    other = compressed(seed=3)
    assert save_checkpoint(other, saved, overwrite=True) == saved
    assert not (saved / "old.txt").exists() and [p.name for p in saved.parent.iterdir()] == ["out"]
    tokens = torch.arange(10)
    assert torch.equal(load_checkpoint(saved, model=Net())(tokens), other(tokens))


def test_parents_are_made_and_the_path_returned(tmp_path):
    path = save_checkpoint(compressed(), str(tmp_path / "a" / "b"))
    assert path == tmp_path / "a" / "b" and (path / "tnc.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SafetensorError("I/O")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_nothing_new(tmp_path, monkeypatch, error, overwrite):
    path = tmp_path / "out"
    if overwrite:
        save_checkpoint(compressed(), path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(shards, "save_file", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected) as caught:
        save_checkpoint(compressed(seed=1), path, overwrite=overwrite)
    if expected is CheckpointError:
        assert "bytes are needed" in str(caught.value) and "are free; nothing was left" in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert list(tmp_path.iterdir()) == ([path] if overwrite else [])


def test_a_failed_exchange_brings_the_old_folder_back(saved, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError("rename refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="rename refused"):
        save_checkpoint(compressed(seed=1), saved, overwrite=True)
    tokens = torch.arange(10)
    assert torch.equal(load_checkpoint(saved, model=Net())(tokens), compressed()(tokens))
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


def test_free_space_is_checked_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(shards, "save_file", lambda *_, **__: pytest.fail("nothing may be written"))
    with pytest.raises(CheckpointError, match=r"out needs \d+ bytes and only 100 are free; nothing was written. Free"):
        save_checkpoint(compressed(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = folder_module.os.fsync, Path.rename
    monkeypatch.setattr(folder_module.os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    save_checkpoint(compressed(), tmp_path / "out")
    assert events == ["fsync"] * 3 + ["rename"]  # shard, tnc.json, folder


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"Net holds no FactoredLinear layer; compress it first"):
        save_checkpoint(Net(), tmp_path / "out")
    model = compressed()
    model.up.report = {"error": object()}
    with pytest.raises(CheckpointError, match=r"cannot be written to tnc.json: .*LayerReport.to_json"):
        save_checkpoint(model, tmp_path / "out")
    model.up.report = {"error": float("nan")}
    with pytest.raises(CheckpointError, match=r"cannot be written to tnc.json"):
        save_checkpoint(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"state '.*' is on meta; expected a tensor with numbers"):
        save_checkpoint(compressed().to("meta"), tmp_path / "out")
    model = compressed()

    class Counting(Net):
        def get_extra_state(self):
            return {"step": 1}

    with pytest.raises(CheckpointError, match=r"state '_extra_state' is dict; expected a tensor"):
        save_checkpoint(Counting(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_folder(saved):
    mode = saved.stat().st_mode
    assert {file.stat().st_mode & 0o777 for file in saved.iterdir()} == {mode & 0o666}


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = compressed().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save_checkpoint(model, tmp_path / "out")
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_copied_folder_still_loads(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    assert load_layers(tmp_path / "copy").keys() == load_layers(saved).keys()
