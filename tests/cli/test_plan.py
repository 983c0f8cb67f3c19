"""Planning on the command line, on the embedded model: one calibration, several budgets, an edited plan."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from tnc.cli import app

pytest.importorskip("transformers")
run = CliRunner()
LAYERS = ("--include", "*.1.self_attn.*", "--include", "*.0.mlp.down_proj")


def call(*arguments, code=0):
    result = run.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Statistics, curves and a plan of five layers of the embedded model."""
    path = tmp_path_factory.mktemp("plan")
    result = call("plan", "demo", "--budget", "bpw=3.5", "--stats", path / "stats.safetensors", "--calib", "demo",
                  "--sequences", 4, "--context", 128, "--out", path / "plan.json", "--json", *LAYERS)  # fmt: skip
    (path / "result.json").write_text(result.stdout)
    return path


def again(folder, *arguments, code=0):
    return call("plan", "demo", "--stats", folder / "stats.safetensors", *LAYERS, *arguments, code=code)


def test_json_has_the_promised_fields(folder):
    found = json.loads((folder / "result.json").read_text())
    assert found["bits_per_weight"] <= 3.5
    assert found["lower_bound"] <= found["value"]
    assert found["planning_seconds"] < 5
    assert len(found["layers"]) == 5
    layer = found["layers"]["model.layers.0.mlp.down_proj"]
    assert {"base", "rank", "factors", "bits", "nats", "error", "share", "why"} <= set(layer)
    assert (folder / "stats.curves.safetensors").is_file()
    assert json.loads((folder / "plan.json").read_text())["layers"] == found["layers"]


def test_front_picture_and_page(folder):
    output = again(folder, "--pareto", "--budget", "bpw=4.5", "--report", folder / "report").output
    assert "bits/weight" in output
    assert "no choice is better than" in output
    assert (folder / "report" / "plan.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "report" / "index.html").read_text()
    assert "plan(bpw=4.5)" in page
    assert "model.layers.0.mlp.down_proj" in page
    front = json.loads(again(folder, "--pareto", "--json").stdout)["front"]
    assert all(a["value"] > b["value"] for a, b in itertools.pairwise(front))


def test_compress_by_a_plan_and_by_an_edited_one(folder):
    base = ("compress", "demo", "--stats", folder / "stats.safetensors", "--plan")
    done = json.loads(call(*base, folder / "plan.json", "--out", folder / "small", "--json").stdout)
    planned = json.loads((folder / "plan.json").read_text())
    assert done["bits_per_weight"] == planned["bits_per_weight"]
    assert done["shortfalls"] == []
    assert done["predicted_nats"] == pytest.approx(planned["predicted_nats"], rel=0.05)
    planned["layers"]["model.layers.0.mlp.down_proj"] |= {"base": "dense", "rank": 0}
    (folder / "edited.json").write_text(json.dumps(planned))
    edited = call(*base, folder / "edited.json", "--out", folder / "edited")
    assert "the budget bpw=3.5 is not met: it is" in " ".join(edited.output.split())
    manifest = json.loads(call("inspect", folder / "edited", "--json").stdout)
    assert manifest["recipe"] == "plan(bpw=3.5, edited)"
    assert manifest["layers"]["model.layers.0.mlp.down_proj"]["spec"]["kind"] == "dense"


def test_nats_are_met_as_measured(folder):
    found = json.loads(again(folder, "--budget", "nats=0.01", "--text", "demo", "--limit", 2, "--json").stdout)
    assert found["measured"]["kl"] <= 0.01
    assert found["predicted_nats"] == pytest.approx(found["measured"]["kl"])


def test_plans_and_their_layers_are_measured_on_text(folder):
    asked = ("--budget", "bpw=3", "--text", "demo", "--limit", 2)
    plain = json.loads(again(folder, *asked, "--json").stdout)
    assert plain["predicted_nats"] == pytest.approx(plain["measured"]["kl"])
    assert all(layer["measured"] is None for layer in plain["layers"].values())
    output = again(folder, *asked, "--alone", "--report", folder / "alone", "--out", folder / "alone.json").output
    assert "measured alone" in " ".join(output.split())
    layers = json.loads((folder / "alone.json").read_text())["layers"]
    assert all(layer["measured"] > 0 for layer in layers.values())
    page = (folder / "alone" / "index.html").read_text()
    assert "sum of the layers measured alone" in page
    assert "sum of the blocks measured alone" in page
    assert "<th>measured alone</th><th>over nats</th>" in page
    assert (folder / "alone" / "plan.png").stat().st_size > (folder / "report" / "plan.png").stat().st_size


def test_layers_are_probed_on_a_text_of_its_own(folder):
    asked = ("--budget", "bpw=3", "--probe", "demo", "--context", 128, "--json")
    found = json.loads(again(folder, *asked).stdout)
    weights = [layer["weight"] for layer in found["layers"].values()]
    assert len(set(weights)) == len(weights)
    assert found["predicted_nats"] == pytest.approx(sum(x["weight"] * x["nats"] for x in found["layers"].values()))
    assert (folder / "stats.probes.json").is_file()
    assert json.loads(again(folder, *asked).stdout)["layers"] == found["layers"]
    stale = again(folder, "--budget", "bpw=3", "--probe", "demo", "--context", 64, code=2)
    assert "are stale" in " ".join(stale.output.split())


def test_latency_table_and_budget(folder):
    table = folder / "latency.json"
    call("bench", "demo", "--table", table, "--tokens", 1, "--ranks", 0, "--ranks", 16, "--repeats", 1, "--json")
    found = json.loads(again(folder, "--budget", "speedup=0.02", "--table", table, "--json").stdout)
    assert all(layer["seconds"] > 0 for layer in found["layers"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes there")
def test_what_bench_needs_is_said():
    said = " ".join(call("bench", "--tune", code=2).output.split())
    assert "got device cpu; only tiles of the fused kernels are tuned" in said
    assert "needs MODEL and --table FILE, or --tune" in " ".join(call("bench", "demo", code=2).output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tnc plan needs --budget"),
        (("--budget", "size=3"), "budget 'size=3' is unknown; expected one of bpw=3.5"),
        (("--budget", "bpw=0.1"), "below the smallest reachable"),
        (("--budget", "bpw=99"), "above the largest option"),
        (("--budget", "bpw=4", "--group-size", 32), "are stale"),
        (("--budget", "latency=1ms"), "needs measured times"),
        (("--budget", "nats=0.1", "--text", "demo", "--limit", 0), "leaves no window"),
        (("--budget", "bpw=4", "--alone"), "pass --budget and --text FILE too"),
    ],
)
def test_mistakes_are_explained(folder, arguments, message):
    assert message in " ".join(again(folder, *arguments, code=2).output.split())


def test_statistics_are_asked_for(tmp_path):
    assert "needs --stats FILE" in call("plan", "demo", "--budget", "bpw=4", code=2).output
    missing = call("plan", "demo", "--budget", "bpw=4", "--stats", tmp_path / "x.safetensors", code=2)
    assert "pass --calib TEXT" in " ".join(missing.output.split())


def test_recipe_or_plan(folder):
    both = call(
        "compress", "demo", "--plan", folder / "plan.json", "--recipe", "rtn", "--bits", 4, "--out", "x", code=2
    )
    assert "leave out --recipe, --bits" in " ".join(both.output.split())
    neither = call("compress", "demo", "--out", "x", code=2)
    assert "needs --recipe NAME" in " ".join(neither.output.split())


def test_rotated_and_refined_bases_cost_fewer_nats(folder):
    plain = json.loads((folder / "result.json").read_text())
    result = again(folder, "--curves", folder / "rotated.safetensors", "--budget", "bpw=3.5", "--method", "yaqa",
                   "--refine", 1, "--rotated", "--out", folder / "rotated.json", "--json")  # fmt: skip
    found = json.loads(result.stdout)
    assert found["bits_per_weight"] <= 3.5
    assert found["predicted_nats"] < plain["predicted_nats"]
    base = json.loads((folder / "rotated.json").read_text())["portfolio"]["bases"]["int3-g64"]
    assert (base["method"], base["refine"], len(base["transforms"])) == ("yaqa", 1, 2)
    small = folder / "rotated"
    call("compress", "demo", "--plan", folder / "rotated.json", "--stats", folder / "stats.safetensors", "--out", small)
    assert (small / "tnc.json").is_file()
