"""``tnc plan``: error curves once, then a plan for any budget, the front, a picture and a page."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tnc.cli import console
from tnc.cli.calibration import calibration_data
from tnc.cli.plan_page import write_page
from tnc.cli.sources import context_of, open_model, open_text, resolve_device
from tnc.decompose import BitsPerWeight, InputRotation, OutputRotation
from tnc.errors import BudgetError, StatsError, TextError
from tnc.models.planning import error_curves, measure_plan, plan
from tnc.models.probes import probe_layers
from tnc.models.text import full_windows, sample_windows, token_windows
from tnc.planning import (
    AllowedRanks,
    Clock,
    Constraint,
    CurveTable,
    KeepDense,
    LatencyTable,
    Plan,
    Portfolio,
    Problem,
    Rules,
    parse_budget,
)
from tnc.stats import LayerStats

PROBE_WINDOWS = 32
"""Windows on which each layer is measured alone."""

_FRONT_ROWS = 16


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked for; see ``tnc plan --help``."""

    model: str
    budgets: list[str]
    out: Path | None
    pareto: bool
    report: Path | None
    calib: str | None
    stats: Path | None
    curves: Path | None
    text: str | None
    limit: int
    alone: bool
    group_size: int
    method: str
    refine: int
    rotated: bool
    formats: list[str]
    shared: bool
    fused: bool
    keep_dense: list[str]
    served_ranks: bool
    probe: str | None
    table: Path | None
    tokens: int
    exact: bool
    sequences: int
    context: int | None
    fisher: bool
    include: list[str] | None
    exclude: list[str] | None
    seed: int
    device: str


def run_plan(options: PlanOptions, *, as_json: bool) -> None:
    """Plan, write and print."""
    budgets = tuple(parse_budget(text) for text in options.budgets)
    if not budgets and not options.pareto:
        raise BudgetError("tnc plan needs --budget, for example --budget bpw=3.5, or --pareto for the whole front.")
    if options.alone and (options.text is None or not budgets):
        raise TextError("--alone measures the layers of a plan on held-out text; pass --budget and --text FILE too.")
    rules = _rules(options)
    model, tokenizer = open_model(options.model, device=resolve_device(options.device))
    with console.progress_bars() as progress:
        stats = _stats(options, model, tokenizer, progress)
        table = error_curves(
            model, stats, _portfolio(options),
            include=options.include, exclude=options.exclude, cache=_cache(options), progress=progress,
        )  # fmt: skip
        if options.probe is not None:
            rules = replace(rules, weights=_weights(options, model, tokenizer, stats, table, progress))
        start = time.perf_counter()
        found = None
        if budgets:
            windows = None if options.text is None else _windows(options, model, tokenizer)
            scored = model if windows is None else copy.deepcopy(model).float()
            dtype = next(iter(model.parameters())).dtype
            found = plan(scored, stats, budgets, rules=rules, curves=table, windows=windows, dtype=dtype,
                         progress=progress)  # fmt: skip
            if windows is not None and (found.measured is None or options.alone):
                found = measure_plan(scored, stats, found, windows, dtype=dtype, alone=options.alone,
                                     progress=progress)  # fmt: skip
        front = front_rows(table, rules) if options.pareto or options.report else []
        seconds = time.perf_counter() - start
    if found is not None and options.out is not None:
        found.save(options.out)
    if options.report is not None:
        write_page(options.report, table, front, found)
    result = _result(options, found, front, seconds)
    if as_json:
        console.print_json(result)
    else:
        _print(options, found, front, seconds)


def _weights(
    options: PlanOptions,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    stats: Mapping[str, LayerStats],
    table: CurveTable,
    progress: console.Report,
) -> dict[str, float]:
    """Measured over predicted KL of each layer alone, kept beside the curves."""
    context = context_of(model) if options.context is None else options.context
    assert options.probe is not None, "asked for"
    windows = full_windows(tokenizer, open_text(options.probe, "calibration"), context=context)
    chosen = sample_windows(windows, min(PROBE_WINDOWS, len(windows)), seed=options.seed)
    dense, dtype = copy.deepcopy(model).float(), next(iter(model.parameters())).dtype
    found = probe_layers(dense, stats, table, list(chosen), dtype=dtype, cache=_beside(options, "probes.json"),
                         progress=progress)  # fmt: skip
    return {name: probe.weight for name, probe in found.items()}


def _portfolio(options: PlanOptions) -> Portfolio:
    transforms = (InputRotation(), OutputRotation()) if options.rotated else ()
    return Portfolio.default(
        group_sizes=(options.group_size, None), method=options.method, refine=options.refine, transforms=transforms,
        formats=tuple(options.formats), shared=options.shared,
    )  # fmt: skip


def front_rows(table: CurveTable, rules: Rules) -> list[dict[str, float]]:
    """The lower convex hull of all plans: bits per weight and predicted error, by rising bits."""
    front = Problem.of(table, (BitsPerWeight(16),), rules, 1.0).front()
    return [{"bits_per_weight": float(b) / table.elements, "value": float(max(c, 0.0))}
            for b, c in zip(front.usage, front.cost, strict=True)]  # fmt: skip


def _rules(options: PlanOptions) -> Rules:
    constraints: tuple[Constraint, ...] = ()
    if options.keep_dense:
        constraints += (KeepDense(tuple(options.keep_dense)),)
    if options.served_ranks:
        constraints += (AllowedRanks(),)
    clock = None if options.table is None else Clock(LatencyTable.load(options.table), options.tokens)
    return Rules(constraints=constraints, fused=options.fused, clock=clock, exact=options.exact)


def _stats(
    options: PlanOptions,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    progress: console.Report,
) -> dict[str, LayerStats]:
    """Statistics from their file, or calibrated now on a float32 copy of the model."""
    if options.stats is None:
        raise StatsError("tnc plan needs --stats FILE: read if it exists, else written from --calib TEXT.")
    if not options.stats.exists() and options.calib is None:
        raise StatsError(f"statistics file {options.stats} does not exist; pass --calib TEXT to make it.")
    dense = model if options.stats.exists() else copy.deepcopy(model).float()
    found: dict[str, LayerStats] = calibration_data(options, dense, tokenizer, progress)["stats"]
    return found


def _cache(options: PlanOptions) -> Path:
    return options.curves or _beside(options, "curves.safetensors")


def _beside(options: PlanOptions, ending: str) -> Path:
    """A file beside the statistics, or beside the curves where those have a place of their own."""
    place = options.curves or options.stats
    assert place is not None, "checked with the statistics"
    return place.with_name(f"{place.stem}.{ending}")


def _windows(options: PlanOptions, model: nn.Module, tokenizer: Any) -> list[Any]:  # noqa: ANN401
    context = context_of(model) if options.context is None else options.context
    assert options.text is not None, "asked for"
    if options.limit < 1:
        raise TextError(f"--limit {options.limit} leaves no window to score; use at least 1.")
    return list(token_windows(tokenizer, open_text(options.text, "evaluation"), context))[: options.limit]


def _result(options: PlanOptions, found: Plan | None, front: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    made = {} if found is None else found.to_json()
    return {"model": options.model, "planning_seconds": seconds, **made, "front": front if options.pareto else None}


def _print(options: PlanOptions, found: Plan | None, front: list[dict[str, float]], seconds: float) -> None:
    if options.pareto:
        every = np.unique(np.linspace(0, len(front) - 1, _FRONT_ROWS).round().astype(int))
        rows = [(console.fixed(front[i]["bits_per_weight"], 3), console.number(front[i]["value"], 4)) for i in every]
        console.print_table(f"Front: {len(front)} plans", ("bits/weight", "predicted error"), rows)
    if found is not None:
        _print_plan(found)
        console.say(f"planned in {seconds:.2f} s" + (f"; written to {options.out}" if options.out else ""))
    if options.report is not None:
        console.say(f"report: {options.report / 'index.html'}")


def _print_plan(found: Plan) -> None:
    alone = found.measured_alone
    rows = [
        (
            name, layer.choice.describe(), console.fixed(layer.bits / (layer.shape[0] * layer.shape[1]), 3),
            console.number(layer.nats, 3), *((console.number(layer.measured, 3),) if alone else ()),
            console.fixed(layer.error, 4), f"{layer.share:.1%}", layer.why,
        )
        for name, layer in found.layers.items()
    ]  # fmt: skip
    columns = ("layer", "becomes", "bits/weight", "nats", *(("measured alone",) if alone else ()), "held-out error",
               "share", "runner-up")  # fmt: skip
    console.print_table(found.describe(), columns, rows)
    console.say(f"{found.bits_per_weight:.4f} bits per weight, {found.bytes:,} bytes with everything else")
    nats = found.predicted_nats
    if nats is not None:
        console.say(f"predicted KL {nats:.5g} nats (scale {found.scale:.3g})")
    console.say(f"no choice is better than {found.lower_bound:.6g}; this one is {found.value:.6g}")
    if found.measured is not None:
        console.say(f"measured KL {found.measured['kl']:.5g}, loss {found.measured['delta_nats']:+.5g} nats")
        if "blocks_alone" in found.measured:
            layers, blocks = found.measured["layers_alone"], found.measured["blocks_alone"]
            console.say(f"the layers alone add up to {layers:.5g} nats, the blocks alone to {blocks:.5g}")
    for note in found.notes:
        console.say(f"  {note}")
