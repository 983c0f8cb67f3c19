"""``tnc demo``: the main job on the embedded model, from calibration to a table, a checkpoint and a picture."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnc.checkpoint import check_output_folder, save_checkpoint
from tnc.cli import console
from tnc.cli.picture import draw_front
from tnc.cli.sources import DEMO, open_model
from tnc.decompose import BitsPerWeight, Recipe, recipe
from tnc.models.calibrate import calibrate
from tnc.models.compress import compress
from tnc.models.demo import demo_text
from tnc.models.evaluate import Evaluation, evaluate_many
from tnc.models.report import ModelReport
from tnc.models.text import calibration_batches, token_windows
from tnc.stats import LayerStats

_CONTEXT = 512
_CALIBRATION_SEQUENCES = 96
_EVALUATION_CHARACTERS = 60_000
_TOLERANCE = 0.02  # the saved model is the smallest within 2 % of the dense perplexity


@dataclass(frozen=True, eq=False)
class Trial:
    """One recipe of the demonstration and what came of it."""

    recipe: Recipe
    model: nn.Module
    report: ModelReport
    seconds: float


def trials() -> list[Recipe]:
    """The recipes that the demonstration compares, by family."""
    half = BitsPerWeight(8.0)
    low_rank = [recipe(name, rank=half) for name in ("svd", "svd_llm", "svd_pooled")]
    networks = [recipe("mpo", rank=half)]
    quantized = [recipe(n, bits=bits, group_size=64) for bits in (4, 3, 2) for n in ("rtn", "gptq", "yaqa_refined")]
    both = [recipe("eora", bits=bits, group_size=64, rank=8) for bits in (4, 3, 2)]
    return [*low_rank, *networks, *quantized, *both]


def run_demo(out: Path, *, seed: int, as_json: bool) -> None:
    """Calibrate once, compress with every recipe, score all of them in one pass, write and print."""
    start = time.perf_counter()
    check_output_folder(out)
    torch.manual_seed(seed)
    model, tokenizer = open_model(DEMO, device=torch.device("cpu"))
    stored = next(model.parameters()).dtype
    model = model.float()
    text = demo_text("calibration")
    batches = calibration_batches(tokenizer, text, context=_CONTEXT, sequences=_CALIBRATION_SEQUENCES, seed=seed)
    windows = token_windows(tokenizer, demo_text("evaluation")[:_EVALUATION_CHARACTERS], _CONTEXT)
    with console.progress_bars() as progress:
        stats = calibrate(model, batches, seed=seed, progress=progress)
        done = [_try(model, each, stats, stored, progress, i) for i, each in enumerate(trials())]
        named: dict[str, nn.Module] = {"dense": model, **{t.recipe.describe(): t.model for t in done}}
        scores = evaluate_many(named, windows, reference=model, progress=progress)
    saved = choose_saved(done, scores)
    save_checkpoint(
        saved.model.to(stored), out, base=DEMO, recipe=saved.recipe.describe(), reports=saved.report.layers,
        tokenizer=tokenizer,
    )  # fmt: skip
    result = summary(done, scores, saved, time.perf_counter() - start)
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_front(result["rows"], result["dense"]["perplexity"], out / "front.png")
    if as_json:
        console.print_json(result)
    else:
        _print(result, out)


def _try(
    model: nn.Module, each: Recipe, stats: dict[str, LayerStats], stored: torch.dtype, progress: console.Report, at: int
) -> Trial:
    start = time.perf_counter()
    small = compress(model, each, stats=stats, dtype=stored)
    progress("recipes", at + 1, len(trials()))
    return Trial(each, small, ModelReport.of(small), time.perf_counter() - start)


def choose_saved(done: list[Trial], scores: dict[str, Evaluation]) -> Trial:
    """The smallest model within 2 % of the dense perplexity, or the closest where none is."""
    limit = scores["dense"].perplexity * (1 + _TOLERANCE)
    within = [t for t in done if scores[t.recipe.describe()].perplexity <= limit]
    if within:
        return min(within, key=lambda t: t.report.bits_per_weight)
    return min(done, key=lambda t: scores[t.recipe.describe()].perplexity)


def summary(done: list[Trial], scores: dict[str, Evaluation], saved: Trial, seconds: float) -> dict[str, Any]:
    """The JSON report: a row a recipe, the dense model, and which one was saved."""
    rows = []
    for trial in done:
        score = scores[trial.recipe.describe()]
        fields = trial.report.to_json()
        layers = fields.pop("layers")
        ratio = score.kl / trial.report.predicted_nats if score.kl and trial.report.predicted_nats else None
        rows.append({
            **fields, **score.to_json(), "measured_over_predicted": ratio, "seconds": trial.seconds,
            "fallbacks": sum(bool(layer["fallbacks"]) for layer in layers.values()),
        })  # fmt: skip
    return {
        "rows": rows, "dense": scores["dense"].to_json(), "saved": saved.recipe.describe(), "seconds": seconds,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _print(result: dict[str, Any], out: Path) -> None:
    dense = result["dense"]["perplexity"]
    rows = [
        (
            row["recipe"],
            console.fixed(row["bits_per_weight"], 2),
            console.fixed(row["heldout_relative_error"], 4),
            console.fixed(row["lower_bound"], 4),
            console.number(row["predicted_nats"], 3),
            console.number(row["kl"], 3),
            f"{dense:.3f} → {row['perplexity']:.3f}",
            console.fixed(row["seconds"], 1),
        )
        for row in sorted(result["rows"], key=lambda row: row["bits_per_weight"])
    ]
    columns = (
        "recipe", "bits/weight", "held-out error", "lower bound", "predicted nats", "measured KL", "perplexity", "s",
    )  # fmt: skip
    console.print_table("Embedded model, byte-level, source code it has not seen", columns, rows)
    console.say(f"Saved {result['saved']}: the smallest within {_TOLERANCE:.0%} of the dense perplexity.")
    console.say(f"  checkpoint {out}/   report {out}/report.json   picture {out}/front.png")
    console.say(f"  next: tnc inspect {out}; tnc eval {out} --text demo --limit 64 --reference demo")
    console.say(f"{result['seconds']:.0f} seconds.")
