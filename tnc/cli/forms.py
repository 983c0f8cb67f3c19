"""``tnc forms``: one layer of a model in every form at equal storage bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tnc.cli import console
from tnc.cli.sources import context_of, open_model, open_text, resolve_device
from tnc.errors import ModelError
from tnc.forms import REFERENCE_MACHINE, Comparison, Cost, FormRow, compare_forms, measure_machine
from tnc.models.calibrate import calibrate
from tnc.models.layers import select_layers, weight_of
from tnc.models.text import calibration_batches
from tnc.stats import LayerStats
from tnc.stats_file import load_stats


@dataclass(frozen=True)
class FormsOptions:
    """What the user asked for; see ``tnc forms --help``."""

    model: str
    layer: str
    bits: float
    calib: str | None
    stats: Path | None
    sequences: int
    tokens: list[int]
    measure: bool
    seed: int
    device: str


def run_forms(options: FormsOptions, *, as_json: bool) -> None:
    """Compare and print."""
    model, tokenizer = open_model(options.model, device=resolve_device(options.device))
    model = model.float()
    name, layer = one_layer(model, options.layer)
    with console.progress_bars() as progress:
        stats = layer_stats(options, model, tokenizer, name, progress)
        machine = measure_machine() if options.measure else REFERENCE_MACHINE
        found = compare_forms(
            weight_of(layer).detach().cpu(), stats, bits=options.bits, tokens=options.tokens, machine=machine,
            progress=progress,
        )  # fmt: skip
    if as_json:
        console.print_json({"model": options.model, "layer": name, **found.to_json()})
    else:
        _print(name, found)


def one_layer(model: nn.Module, pattern: str) -> tuple[str, nn.Module]:
    """The layer that a name or glob pattern picks.

    Raises:
        ModelError: if it picks none, or more than one.
    """
    found = select_layers(model, include=[pattern])
    if len(found) > 1:
        raise ModelError(
            f"--layer {pattern!r} matches {len(found)} layers; pick one: {', '.join(list(found)[:4])}, ..."
        )
    return next(iter(found.items()))


def layer_stats(
    options: FormsOptions, model: nn.Module, tokenizer: Any, name: str, progress: console.Report  # noqa: ANN401
) -> LayerStats | None:  # fmt: skip
    """Statistics of one layer from a file or a text; ``None`` with neither."""
    if options.stats is not None:
        stats = load_stats(options.stats)
        if name not in stats:
            raise ModelError(f"{options.stats} holds no statistics of layer {name!r}; calibrate this model again.")
        return stats[name]
    if options.calib is None:
        return None
    text, context = open_text(options.calib, "calibration"), context_of(model)
    windows = sum(len(batch) for batch in calibration_batches(tokenizer, text, context=context))
    batches = calibration_batches(
        tokenizer, text, context=context, sequences=min(options.sequences, windows), seed=options.seed
    )  # fmt: skip
    return calibrate(model, batches, include=[name], seed=options.seed, progress=progress)[name]


def _print(name: str, found: Comparison) -> None:
    tokens = [cost.tokens for cost in found.dense]
    columns = (
        "form", "bits/weight", "error", "held-out", "lower bound", "nats",
        *(f"MACs/token, {t}" for t in tokens), *(f"ms, {t}" for t in tokens),
    )  # fmt: skip
    dense = ("dense", "16.000", "0.0000", "-", "-", "-", *_costs(found.dense))
    rows = [dense, *(_row(row) for row in found.rows if row.report is not None)]
    console.print_table(f"{name} {found.shape[0]} × {found.shape[1]} at {found.bits} bits per weight", columns, rows)
    for row in found.rows:
        if row.report is None:
            console.note(f"{row.form}: left out: {row.reason}")
    console.say(f"smallest {found.measure.replace('_', ' ')}: {found.winner.form}")
    console.say(f"without a quantized base: {found.structured_winner.form}")
    console.say(f"times are predicted for {found.machine.name}, not measured")


def _row(row: FormRow) -> tuple[str, ...]:
    report = row.report
    assert report is not None
    return (
        row.form, console.fixed(report.bits_per_weight, 3), console.fixed(report.relative_error, 4),
        console.fixed(report.heldout_relative_error, 4), console.fixed(report.lower_bound, 4),
        console.number(report.predicted_nats, 3), *_costs(row.costs),
    )  # fmt: skip


def _costs(costs: tuple[Cost, ...]) -> tuple[str, ...]:
    macs = (f"{cost.macs_per_token:.0f}" for cost in costs)
    return (*macs, *(f"{1e3 * cost.seconds:.3f}" for cost in costs))
