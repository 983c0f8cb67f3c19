"""A measurement of every linear layer of a model, in processes, stored as it comes."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.portfolio import on_cpu
from benchmarks.results import write
from benchmarks.run import machine
from tnc import LayerStats, calibrate, load_stats
from tnc.experts import unfuse_experts
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.layers import select_layers, weight_of
from tnc.models.text import calibration_batches, read_text

WEIGHTS: dict[str, Tensor] = {}
STATS: dict[str, LayerStats] = {}
"""Of the layers; filled before processes are started, which inherit them."""

Row = dict[str, Any]


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model", type=Path, nargs="?")
    found.add_argument("--stats", type=Path, help="statistics file")
    found.add_argument("--calib", type=Path, help="calibration text, where there is no file")
    found.add_argument("--context", type=int, default=512)
    found.add_argument("--sequences", type=int, default=128, help="calibration windows")
    found.add_argument("--share", type=float, default=0.5, help="of 16 bits a weight")
    found.add_argument("--only", default="", help="pattern of layer names")
    found.add_argument("--jobs", type=int, default=2, help="processes; 0 measures in this one")
    found.add_argument("--device", default="cpu", help="where layers are decomposed; a GPU takes --jobs 0")
    found.add_argument("--seconds", type=float, default=float("inf"), help="wait for no layer after this time")
    found.add_argument("--out", type=Path, default=Path(out))
    found.add_argument("--table", action="store_true", help="print the tables of --out")
    return found


def measured(arguments: argparse.Namespace, jobs: Sequence[str], measure: Callable[[str], Row]) -> dict[str, Row]:
    """Rows by name, those in ``--out`` and those of ``jobs`` that it lacks; ``measure`` runs in the processes.

    Jobs are begun in the order given.
    """
    found = read(arguments.out)
    todo = [job for job in jobs if job not in found["rows"] and re.search(arguments.only, job)]
    found["machine"], found["share"] = machine(), arguments.share
    for name, row in _results(arguments, todo, _Named(measure)):
        found["rows"][name] = row
        write(arguments.out, found)
    return dict(found["rows"])


def _results(arguments: argparse.Namespace, todo: Sequence[str], measure: _Named) -> Iterator[tuple[str, Row]]:
    """Rows as they come, until ``--seconds`` are over."""
    end = time.monotonic() + arguments.seconds
    if arguments.jobs == 0:
        _alone()
        yield from itertools.takewhile(lambda _: time.monotonic() < end, map(measure, todo))
        return
    with multiprocessing.get_context("fork").Pool(arguments.jobs, _alone) as pool:
        results = pool.imap_unordered(measure, todo)
        for _ in todo:
            try:
                yield results.next(timeout=min(max(end - time.monotonic(), 0), 1e6))
            except multiprocessing.TimeoutError:
                return


def largest_first(layers: Iterable[str]) -> list[str]:
    """Layers by their entries, so that no process waits long for the last one."""
    return sorted(layers, key=lambda layer: -WEIGHTS[layer].numel())


class _Named:
    """The measurement with the name of its layer."""

    def __init__(self, measure: Callable[[str], Row]) -> None:
        self.measure = measure

    def __call__(self, name: str) -> tuple[str, Row]:
        return name, self.measure(name)


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def load(arguments: argparse.Namespace) -> None:
    """Fill `WEIGHTS` and `STATS`, experts as layers of their own, in model order."""
    device = "cuda" if torch.cuda.is_available() and arguments.stats is None else "cpu"
    model = load_model(arguments.model)
    unfuse_experts(model)
    model.to(device)
    if arguments.stats is not None:
        STATS.update(load_stats(arguments.stats))
    else:
        text = read_text(arguments.calib)
        batches = calibration_batches(
            load_tokenizer(arguments.model), text, context=arguments.context, sequences=arguments.sequences
        )  # fmt: skip
        STATS.update(on_cpu(calibrate(model, [batch.to(device) for batch in batches])))
    place = torch.device(arguments.device)
    WEIGHTS.update({name: weight_of(layer).detach().to(place).clone() for name, layer in select_layers(model).items()})
    STATS.update({name: each.to(place) for name, each in STATS.items()})


def read(path: Path) -> dict[str, Any]:
    """What the file holds."""
    return dict(json.loads(path.read_text())) if path.exists() else {"rows": {}}


def kind(name: str) -> str:
    """What layers are grouped by: the last part of the name that is no number."""
    return next(part for part in reversed(name.split(".")) if not part.isdigit())


def middle(values: Sequence[float]) -> str:
    """Median and largest, of values that may be many."""
    return f"{statistics.median(values):.3f} / {max(values):.3f}" if values else "–"
