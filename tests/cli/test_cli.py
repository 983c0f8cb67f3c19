"""The command line on a tiny model folder, the way a user runs it."""

import json
import shutil

import pytest
import torch
from quantized_folder import gptq_folder
from typer.testing import CliRunner

from tnc.cli import app
from tnc.models import compress as compress_driver
from tnc.models.demo import demo_model_path

transformers = pytest.importorskip("transformers")
run = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level Llama with the embedded model's tokenizer, a calibration and an evaluation text."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_path())
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path / "dense")
    tokenizer.save_pretrained(path / "dense")
    words = "the cat sat on the mat and looked at the moon over the hill. "
    (path / "calib.txt").write_text(words * 60)
    (path / "text.txt").write_text(words[::-1] * 20)
    return path


def call(*arguments, code=0):
    result = run.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def test_forms_of_a_layer(folder):
    arguments = ("forms", folder / "dense", "--layer", "*0.mlp.up_proj", "--calib", folder / "calib.txt",
                 "--sequences", 8, "--tokens", 2)  # fmt: skip
    shown = call(*arguments).stdout
    assert "truncated SVD" in shown and "smallest predicted nats" in shown and "not measured" in shown
    found = json.loads(call(*arguments, "--json").stdout)
    assert (found["layer"], found["shape"]) == ("model.layers.0.mlp.up_proj", [64, 32])
    assert "matches 2 layers; pick one" in call(*arguments[:3], "*.mlp.up_proj", code=2).stderr


def test_a_rank_beyond_use_can_be_forced(folder, tmp_path):
    asked = ("compress", folder / "dense", "--recipe", "svd", "--rank", 16, "--calib", folder / "calib.txt",
             "--sequences", 4, "--include", "*k_proj", "--force-rank", "--out", tmp_path / "small")  # fmt: skip
    layers = json.loads(call(*asked, "--json").stdout)["layers"]
    assert {layer["rank"] for layer in layers.values()} == {16}  # the useful limit is 10


def test_draw_a_dense_and_a_factored_layer(folder, compressed):
    pytest.importorskip("matplotlib")
    picture = folder / "layer.png"
    call("draw", folder / "dense", "--layer", "*0.mlp.up_proj", "--recipe", "svd", "--rank", 3, "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(
        call("draw", compressed, "--layer", "model.layers.0.mlp.up_proj", "--out", picture, "--json").stdout
    )
    assert [panel["kind"] for panel in found["panels"]] == ["quantized", "low_rank"]
    assert len(found["panels"][1]["bonds"][0]["values"]) == 4
    assert "is not factored" in call("draw", folder / "dense", "--layer", "x", "--out", picture, code=2).stderr
    shown = call(
        "draw", folder / "dense", "--layer", "*.up_proj", "--recipe", "svd", "--rank", 3, "--out", picture, code=2
    )
    assert "matches 2 layers; pick one" in shown.stderr


def test_sensitivity_as_table_data_and_picture(folder):
    pytest.importorskip("matplotlib")
    stats, picture = folder / "sensitivity.safetensors", folder / "sensitivity.png"
    call("compress", folder / "dense", "--recipe", "svd", "--rank", 2, "--calib", folder / "calib.txt",
         "--out", folder / "svd", "--sequences", 8, "--stats", stats)  # fmt: skip
    arguments = ("sensitivity", folder / "dense", "--stats", stats, "--rank", 4, "--bpw", 8, "--include", "*.0.mlp.*")
    found = json.loads(call(*arguments, "--out", picture, "--json").stdout)
    assert found["sizes"] == ["4", "BitsPerWeight 8"] and len(found["layers"]) == 3 and len(found["rows"]) == 6
    assert all(0 < row["relative_error"] < 1 and row["predicted_nats"] > 0 for row in found["rows"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "predicted nats" in call(*arguments).stdout
    shown = call(*arguments, "--text", folder / "calib.txt", "--windows", 2, "--out", picture).stdout
    assert "measured KL, nats" in shown and picture.read_bytes()[:4] == b"\x89PNG"
    assert "unknown form 'x'; expected one of svd, mpo, blast" in call(*arguments, "--form", "x", code=2).stderr
    assert "got no size" in call(*arguments[:4], code=2).stderr


@pytest.fixture(scope="module")
def compressed(folder):
    call("compress", folder / "dense", "--recipe", "eora", "--bits", 3, "--group-size", 16, "--rank", 4,
         "--calib", folder / "calib.txt", "--out", folder / "small", "--sequences", 16, "--json")  # fmt: skip
    return folder / "small"


def test_compress_json_has_the_promised_fields(folder):
    result = call("compress", folder / "dense", "--recipe", "eora", "--bits", 3, "--group-size", 16, "--rank", 4,
                  "--calib", folder / "calib.txt", "--out", folder / "json", "--sequences", 16, "--json")  # fmt: skip
    found = json.loads(result.stdout)
    fields = {"bits_per_weight", "relative_error", "heldout_relative_error", "predicted_nats", "lower_bound", "seconds"}
    assert fields | {"out", "layers"} <= set(found)
    layer = found["layers"]["model.layers.0.mlp.up_proj"]
    assert fields | {"rank", "bits", "fallbacks"} <= set(layer)
    assert (layer["rank"], layer["bits"]) == (4, 3)
    # 3-bit codes, a 16-bit scale and a 3-bit zero a group, padded to bytes; bf16 factors of rank 4
    assert layer["storage_bits"] == 64 * (32 * 3 + 2 * 16 + 8) + (64 + 32) * 4 * 16


def test_compress_measures_what_it_predicts(folder):
    texts = ("--calib", folder / "calib.txt", "--text", folder / "text.txt")
    base = ("--recipe", "rtn", "--bits", 4, "--group-size", 16)
    result = call("compress", folder / "dense", *base, *texts, "--out", folder / "measured", "--json")
    found = json.loads(result.stdout)
    assert found["measured"]["kl"] > 0
    assert found["measured_over_predicted"] == found["measured"]["kl"] / found["predicted_nats"]


def test_a_checkpoint_is_replaced_only_where_that_is_asked(folder, tmp_path):
    asked = ("compress", folder / "dense", "--recipe", "rtn", "--group-size", 16, "--out", tmp_path / "small", "--json")
    first = json.loads(call(*asked, "--bits", 4).stdout)
    message = call(*asked, "--bits", 3, code=2).stderr
    assert "or replace it with overwrite=True (--overwrite of tnc compress)" in " ".join(message.split())
    second = json.loads(call(*asked, "--bits", 3, "--overwrite").stdout)
    assert second["linear_bytes"] < first["linear_bytes"] < first["model_bytes"]
    assert json.loads(call("inspect", tmp_path / "small", "--json").stdout)["recipe"].startswith("rtn(bits=3")
    call("compress", folder / "dense", "--recipe", "rtn", "--bits", 4, "--group-size", 16, "--out", folder / "dense",
         "--overwrite", code=2)  # fmt: skip


def test_eval_json_with_reference(folder, compressed):
    result = call("eval", compressed, "--text", folder / "text.txt", "--context", 64, "--reference", folder / "dense",
                  "--json")  # fmt: skip
    found = json.loads(result.stdout)
    promised = {
        "perplexity",
        "bits_per_byte",
        "tokens",
        "bits_per_weight",
        "linear_bytes",
        "model_bytes",
        "kl",
        "top1_agreement",
    }
    assert promised <= set(found)
    dense = json.loads(call("eval", folder / "dense", "--text", folder / "text.txt", "--context", 64, "--json").stdout)
    assert dense["bits_per_weight"] == 16
    for key in ("linear_bytes", "model_bytes"):
        assert found[key] < dense[key]
    assert found["kl"] > 0


def test_inspect_and_tables(folder, compressed):
    manifest = json.loads(call("inspect", compressed, "--json").stdout)
    assert len(manifest["layers"]) == 14
    assert "int3 g16 + rank 4" in call("inspect", compressed).stdout
    assert "perplexity" in call("eval", compressed, "--text", folder / "text.txt", "--context", 64).stdout
    assert "svd_llm" in call("recipes").stdout


def test_statistics_are_written_then_reused(folder):
    stats = folder / "stats.safetensors"
    base = ["compress", folder / "dense", "--recipe", "gptq", "--bits", 4, "--group-size", 16]
    call(*base, "--calib", folder / "calib.txt", "--stats", stats, "--out", folder / "a", "--sequences", 8)
    assert stats.is_file()
    call(*base, "--stats", stats, "--out", folder / "b")
    a, b = (json.loads(call("inspect", folder / name, "--json").stdout)["layers"] for name in "ab")
    for name, layer in a.items():
        assert layer["report"]["relative_error"] == b[name]["report"]["relative_error"]


BASE = ["--recipe", "rtn", "--bits", 4, "--group-size", 16, "--out", "never"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "nowhere", *BASE], "does not exist"),
        (
            ["compress", "{dense}", "--recipe", "magic", "--out", "never"],
            "unknown recipe 'magic'; expected one of",
        ),
        (["compress", "{dense}", "--recipe", "rtn", "--bits", 7, "--out", "never"], "IntFormat(bits=7)"),
        (["compress", "{dense}", *BASE, "--group-size", 48], "does not divide"),
        (["compress", "{dense}", "--recipe", "svd", "--rank", 999, "--out", "never"], "outside 0 <= rank"),
        (["compress", "{dense}", "--recipe", "svd", "--rank", 2, "--bpw", 3, "--out", "never"], "exclude each other"),
        (
            ["compress", "{dense}", "--recipe", "svd", "--rank", 16, "--include", "*k_proj", "--out", "never"],
            "above the useful limit",
        ),
        (["compress", "{dense}", "--recipe", "svd", "--bpw", 3, "--force-rank", "--out", "never"], "allows a --rank"),
        (["compress", "{dense}", *BASE, "--calib", "{short}"], "shorter than one window"),
        (["compress", "{dense}", "--recipe", "rtn", "--bits", 4, "--out", "{dense}"], "exists"),
        (["compress", "{dense}", *BASE, "--device", "cuda:7"], "cannot be used"),
        (["eval", "{dense}", "--text", "{missing}"], "does not exist"),
        (["inspect", "{dense}"], "tnc.json"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    places = {"dense": folder / "dense", "short": tmp_path / "short.txt", "missing": tmp_path / "missing.txt"}
    result = call(*(str(a).format(**places) for a in arguments), code=2)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "never").exists()
    assert not [p for p in tmp_path.iterdir() if p.name not in {"short.txt"}]


def test_pickle_only_folder_is_refused(folder, tmp_path):
    shutil.copytree(folder / "dense", tmp_path / "pickle")
    for file in (tmp_path / "pickle").glob("*.safetensors"):
        file.rename(file.with_name("pytorch_model.bin"))
    result = call("compress", tmp_path / "pickle", *BASE[:-1], tmp_path / "never", code=2)
    assert "pickle" in result.output


def test_interrupt_leaves_nothing(folder, tmp_path, monkeypatch):
    import tnc.cli.compress as command

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compress", stop)
    result = call("compress", folder / "dense", *BASE[:-1], tmp_path / "never", code=130)
    assert "interrupted" in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_goes_on(folder, monkeypatch):
    out, resume = folder / "stopped", folder / "stopped.resume"
    asked = (
        "compress",
        folder / "dense",
        "--recipe",
        "rtn",
        "--bits",
        4,
        "--calib",
        folder / "calib.txt",
        "--out",
        out,
    )
    real, calls = compress_driver.decompose_by, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(compress_driver, "decompose_by", interrupted)
    assert "nothing was written under the final name" in call(*asked, code=130).output
    assert (not out.exists(), len(list(resume.iterdir()))) == (True, 4)
    assert "4 finished layers" in call(*asked).output
    assert (out.exists(), resume.exists(), len(calls)) == (True, False, 5 + 14 - 4)


def test_a_quantized_folder_is_compensated(folder):
    small = folder / "of a base"
    asked = ("compress", folder / "dense", "--base", folder / "gptq", "--calib", folder / "calib.txt", "--json")
    message = call(*asked, "--recipe", "rtn", "--bits", 4, "--out", small, code=2).output
    assert "use --recipe compensate" in message
    call(*asked, "--recipe", "compensate", "--rank", 4, "--out", small, code=2)  # no such folder yet
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense")
    gptq_folder(model.float(), folder / "gptq")
    found = json.loads(call(*asked, "--recipe", "compensate", "--rank", 4, "--out", small).stdout)
    layer = found["layers"]["model.layers.0.self_attn.q_proj"]
    assert (layer["rank"], layer["bits"], len(found["layers"])) == (4, 4, 8)
    assert layer["relative_error"] > 0


def test_the_best_at_a_budget_of_bits(folder):
    asked = ("compress", folder / "dense", "--calib", folder / "calib.txt", "--recipe", "best-at-bits")
    found = json.loads(call(*asked, "--budget", "bpw=5", "--out", folder / "best", "--json").stdout)
    assert found["bits_per_weight"] <= 5
    assert all("best of" in " ".join(layer["choices"]) for layer in found["layers"].values())
    message = call(*asked, "--budget", "nats=0.1", "--out", folder / "other", code=2).output
    assert "use tnc plan" in message.replace("\n", " ")
