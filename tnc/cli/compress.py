"""``tnc compress``: a model folder and a text in, a self-contained checkpoint folder out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnc.checkpoint import Journal, check_output_folder, save_checkpoint
from tnc.checkpoint.save import stored_tensors
from tnc.cli import console
from tnc.cli.calibration import calibration_data
from tnc.cli.sources import context_of, open_model, open_text, resolve_device
from tnc.decompose import BitsPerWeight, QuantizeStage, Rank, Recipe, RelativeError, Size, recipe
from tnc.errors import RecipeError
from tnc.foreign import load_base
from tnc.models.compress import compress
from tnc.models.evaluate import evaluate, model_bytes
from tnc.models.layers import select_layers, weight_of
from tnc.models.report import ModelReport
from tnc.models.text import token_windows
from tnc.planning import Plan, parse_budget, shortfalls
from tnc.terms import Expression

_NOT_WITH_PLAN = (
    "recipe", "bits", "group_size", "symmetric", "format", "rank", "cores", "error", "bpw", "base", "include",
    "exclude", "budget", "force_rank",
)  # fmt: skip


@dataclass(frozen=True)
class CompressOptions:
    """What the user asked for; see ``tnc compress --help``."""

    model: str
    recipe: str | None
    out: Path
    calib: str | None
    text: str | None
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    format: str | None
    rank: int | None
    cores: int | None
    error: float | None
    bpw: float | None
    budget: str | None
    stats: Path | None
    sequences: int
    context: int | None
    fisher: bool
    sequential: bool
    include: list[str] | None
    exclude: list[str] | None
    seed: int
    device: str
    base: Path | None = None
    plan: Path | None = None
    force_rank: bool = False
    overwrite: bool = False


def run_compress(options: CompressOptions, *, as_json: bool) -> None:
    """Compress, save and report."""
    start = time.perf_counter()
    chosen = _recipe(options) if options.plan is None else _plan(options, options.plan)
    check_output_folder(options.out, overwrite=options.overwrite)
    device = resolve_device(options.device)
    model, tokenizer = open_model(options.model, device=device)
    stored = _stored_dtype(model)
    model = model.float()
    bases = _bases(options, chosen, model)
    journal = Journal(options.out.with_name(f"{options.out.name}.resume"))
    if len(journal):
        console.note(
            f"{journal.folder} holds {len(journal)} finished layers of an earlier run; those of this run are kept."
        )
    with console.progress_bars() as progress:
        data = calibration_data(options, model, tokenizer, progress)
        small = compress(
            model, chosen, **data, fisher=options.fisher, sequential=options.sequential, include=options.include,
            exclude=options.exclude, dtype=stored, seed=options.seed, inplace=True, progress=progress, journal=journal,
            bases=bases,
        )  # fmt: skip
        measured = _measured(options, small, tokenizer, ModelReport.of(small), progress)
    small = small.to(stored)  # what was not factored goes back to the dtype it came in
    report = ModelReport.of(small)
    path = save_checkpoint(
        small, options.out, base=options.model, recipe=chosen.describe(), reports=report.layers, tokenizer=tokenizer,
        overwrite=options.overwrite,
    )  # fmt: skip
    journal.clear()
    seconds = time.perf_counter() - start
    total = sum(t.numel() * t.element_size() for t in stored_tensors(small).values())
    told = () if isinstance(chosen, Recipe) else shortfalls(chosen, report.layers, total_bytes=total)
    result = {
        "out": str(path),
        "model_bytes": model_bytes(small),
        "shortfalls": list(told),
        **measured,
        **report.to_json(),
        "seconds": seconds,
    }
    if as_json:
        console.print_json(result)
    else:
        _print(result)


def _plan(options: CompressOptions, path: Path) -> Plan:
    """The plan of ``--plan``, which stands in the place of a recipe and its sizes."""
    given = [name for name in _NOT_WITH_PLAN if getattr(options, name)]
    if given:
        raise RecipeError(
            f"--plan says what every layer becomes; leave out {', '.join('--' + g.replace('_', '-') for g in given)}, "
            "or edit the plan."
        )
    return Plan.load(path)


def _bases(options: CompressOptions, chosen: Recipe | Plan, model: nn.Module) -> Mapping[str, Expression] | None:
    """The layers of ``--base``, checked against the model."""
    if options.base is None:
        return None
    if isinstance(chosen, Recipe) and any(isinstance(stage, QuantizeStage) for stage in chosen.stages):
        raise RecipeError(
            f"--base brings a quantized base and recipe {chosen.name!r} makes one of its own; use --recipe compensate."
        )
    base = load_base(options.base)
    base.check_model(model)
    return base.layers


def _measured(
    options: CompressOptions,
    small: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    report: ModelReport,
    progress: console.Report,
) -> dict[str, Any]:
    """Scores on the held-out text beside the dense model, and measured over predicted nats; nothing without text."""
    if options.text is None:
        return {}
    dense = open_model(options.model, device=resolve_device(options.device))[0].float()
    context = context_of(dense) if options.context is None else options.context
    windows = token_windows(tokenizer, open_text(options.text, "evaluation"), context)
    scores = evaluate(small, windows, reference=dense, progress=progress)
    ratio = scores.kl / report.predicted_nats if scores.kl is not None and report.predicted_nats else None
    return {"measured": scores.to_json(), "measured_over_predicted": ratio}


def _recipe(options: CompressOptions) -> Recipe:
    if options.recipe is None:
        raise RecipeError("tnc compress needs --recipe NAME (see tnc recipes), or --plan FILE (see tnc plan).")
    sizes: list[Size] = []
    if options.rank is not None:
        sizes.append(Rank(options.rank, forced=True) if options.force_rank else options.rank)
    if options.error is not None:
        sizes.append(RelativeError(options.error))
    if options.bpw is not None:
        sizes.append(BitsPerWeight(options.bpw))
    if options.budget is not None:
        sizes.append(_bits(options.budget))
    if options.force_rank and options.rank is None:
        raise RecipeError("--force-rank allows a --rank above mn/(m+n); give that --rank, or leave --force-rank out.")
    if len(sizes) > 1:
        raise RecipeError(f"--rank, --error, --bpw, --budget exclude each other; got {len(sizes)} of them. Keep one.")
    return recipe(
        options.recipe, bits=options.bits, group_size=options.group_size, symmetric=options.symmetric,
        format=options.format, rank=sizes[0] if sizes else None, cores=options.cores,
    )  # fmt: skip


def _bits(text: str) -> BitsPerWeight:
    budget = parse_budget(text)
    if not isinstance(budget, BitsPerWeight):
        raise RecipeError(f"--budget {text} is no number of bits, all that a recipe takes; use tnc plan for it.")
    return budget


def _stored_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the model's linear layers in its file."""
    return weight_of(next(iter(select_layers(model).values()))).dtype


def _print(result: dict[str, Any]) -> None:
    console.say(f"{result['out']}: {result['recipe']}")
    rows = [
        ("bits per weight (compressed layers)", console.fixed(result["bits_per_weight"], 3)),
        ("bytes of the compressed layers", f"{result['linear_bytes']:,}"),
        ("bytes of the whole model", f"{result['model_bytes']:,}"),
        ("relative output error, calibration tokens", console.fixed(result["relative_error"], 4)),
        ("relative output error, held-out tokens", console.fixed(result["heldout_relative_error"], 4)),
        ("no such form does better than", console.fixed(result["lower_bound"], 4)),
        ("predicted KL to the dense model, nats", console.fixed(result["predicted_nats"], 4)),
        ("measured KL to the dense model, nats", console.fixed(result.get("measured", {}).get("kl"), 4)),
        ("measured over predicted", console.fixed(result.get("measured_over_predicted"), 2)),
        ("layers", str(len(result["layers"]))),
        ("layers with fallbacks", str(sum(bool(layer["fallbacks"]) for layer in result["layers"].values()))),
        ("seconds", console.fixed(result["seconds"], 1)),
    ]
    console.print_table("Compressed", ("mean over layers, as stored", "value"), rows)
    for shortfall in result["shortfalls"]:
        console.say(f"  {shortfall}")
    for name, layer in result["layers"].items():
        for fallback in layer["fallbacks"]:
            console.say(f"  {name}: {fallback}")
