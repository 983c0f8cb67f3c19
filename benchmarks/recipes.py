"""Every recipe at about the same bits, over several samples of the calibration text.

    python -m benchmarks.recipes MODEL --calib TEXT --text TEXT --seeds 0 1 2 --jobs 8 --out results/recipes.json

A row is (recipe, bits, seed): bits per weight, held-out error, predicted nats, seconds of one core, and KL, Δloss and
perplexity on held-out text beside the dense model. Layers of all rows are one queue for processes of one thread; the
first process scores rows and writes them as they come. Rows that ``--out`` or a file of ``--known`` has are not made
again, and ``--seconds`` starts no row after that time. With ``--on-device`` the first process makes rows as
`tnc.compress` does, on its device, recipes that need text too. `benchmarks.recipe_tables` makes tables of the files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.planned_model import Start, parser, totals
from benchmarks.recipe_rows import Row, rows
from benchmarks.results import read, write
from benchmarks.run import machine
from benchmarks.windows import spread
from benchmarks.workshop import Made
from tnc import LayerStats, calibrate, compress, load_stats, save_stats
from tnc.decompose import Decomposition
from tnc.decompose.best import decompose_by
from tnc.decompose.shared import decompose_shared
from tnc.errors import TNCError
from tnc.models.evaluate import evaluate
from tnc.models.sharing import sharing_groups
from tnc.models.text import calibration_batches, read_text, token_windows


@dataclass(frozen=True)
class Task:
    """A row of one sample of the calibration text."""

    row: Row
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        """By which a file knows it."""
        return self.row.recipe.describe(), self.row.bits, self.seed


@dataclass(frozen=True)
class _Part:
    """Layers of a task that are decomposed together."""

    task: int
    layers: tuple[str, ...]


_Layer = tuple[str, int, float, float, float, Any]  # name, bits, nats, held-out error, seconds, matrix
_WORK: dict[str, Any] = {}  # weights, tasks and statistics by seed, inherited by the processes


def _make(part: _Part) -> tuple[_Part, list[_Layer] | str]:
    try:
        return part, [_layer(*each) for each in zip(part.layers, _decomposed(part), strict=True)]
    except TNCError as error:  # a small layer may have no room for factors; the row is left out, and says so
        return part, f"{', '.join(part.layers)}: {error}"


def _decomposed(part: _Part) -> list[Decomposition]:
    torch.set_num_threads(1)
    task: Task = _WORK["tasks"][part.task]
    made, known = task.row.recipe, _WORK["stats"][task.seed]
    weights, stats = [_WORK["weights"][name] for name in part.layers], [known[name] for name in part.layers]
    if len(part.layers) > 1:
        return decompose_shared(weights, made.stages, stats, sweeps=made.sweeps)
    return [decompose_by(weights[0], made, stats[0])]


def _layer(name: str, found: Decomposition) -> _Layer:
    report, matrix = found.report, found.operator.to_dense().float().numpy()
    nats, heldout = float(report.predicted_nats or 0), float(report.heldout_relative_error or 0)
    return name, report.storage_bits, nats, heldout, report.seconds, matrix


def _parts() -> Iterator[_Part]:
    """Layers of all tasks in order, those with one right factor together, the largest of a task first."""
    weights: Mapping[str, Tensor] = _WORK["weights"]
    for number, task in enumerate(_WORK["tasks"]):
        groups = sharing_groups(dict.fromkeys(weights, task.row.recipe), _WORK["stats"][task.seed])
        for names in sorted(groups, key=lambda names: -sum(weights[name].numel() for name in names)):
            yield _Part(number, tuple(names))


def made_by_layers(jobs: int) -> Iterator[tuple[Task, dict[str, Made], float]]:
    """Finished tasks, their layers and the seconds of all; tasks that a layer does not take are left out."""
    partial: dict[int, dict[str, Made]] = {number: {} for number in range(len(_WORK["tasks"]))}
    seconds = dict.fromkeys(partial, 0.0)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for part, layers in pool.imap_unordered(_make, _parts()):
            task = _WORK["tasks"][part.task]
            if isinstance(layers, str):
                if partial.pop(part.task, None) is not None:
                    print(f"{task.row.recipe.describe()} seed {task.seed} left out: {layers}", flush=True)
                continue
            for name, bits, nats, heldout, spent, matrix in layers if part.task in partial else ():
                partial[part.task][name] = Made(bits, nats, heldout, torch.from_numpy(matrix))
                seconds[part.task] += spent
            if len(partial.get(part.task, ())) == len(_WORK["weights"]):
                yield task, partial.pop(part.task), seconds[part.task]


def made_on_device(
    tasks: Iterable[Task], start: Start, arguments: argparse.Namespace
) -> Iterator[tuple[Task, dict[str, Made], float]]:
    """Finished tasks, as `compress` makes them of the model on its device; what fails is left out and says so."""
    device, known = next(start.dense.parameters()).device, {}
    for task in tasks:
        began, made, row = time.monotonic(), {}, task.row
        text = calibration_batches(start.tokenizer, read_text(arguments.calib), context=arguments.context,
                                   sequences=arguments.sequences, seed=task.seed)  # fmt: skip
        batches = [batch.to(device) for batch in text]
        try:
            if row.sequential:
                small = compress(start.dense, row.recipe, batches, sequential=True, seed=task.seed)
            else:
                if task.seed not in known:
                    known = {task.seed: calibrate(start.dense, batches, seed=task.seed)}
                small = compress(start.dense, row.recipe, batches, stats=known[task.seed], seed=task.seed)
        except (TNCError, RuntimeError) as error:
            print(f"{row.recipe.describe()} seed {task.seed} left out: {error}", flush=True)
            continue
        for name in start.weights:
            layer: Any = small.get_submodule(name)
            report = layer.report
            nats, heldout = float(report["predicted_nats"] or 0), float(report["heldout_relative_error"] or 0)
            made[name] = Made(report["storage_bits"], nats, heldout, layer.operator.to_dense().float().cpu())
        yield task, made, time.monotonic() - began


def _statistics(arguments: argparse.Namespace, seeds: list[int]) -> dict[int, dict[str, LayerStats]]:
    """Of every seed, from a process of its own: processes forked after a backward pass cannot run one."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {seed: Path(folder) / f"{seed}.safetensors" for seed in seeds}
        calibrating = multiprocessing.get_context("spawn").Process(target=_calibrate, args=(arguments, paths))
        calibrating.start()
        calibrating.join()
        return {seed: dict(load_stats(path)) for seed, path in paths.items()}


def _calibrate(arguments: argparse.Namespace, paths: Mapping[int, Path]) -> None:
    start = Start.of(arguments)
    for seed, path in paths.items():
        save_stats(start.statistics(arguments, seed), path)


def _start(arguments: argparse.Namespace) -> Start:
    """With windows spread over the whole text, a short last one among those they are chosen from."""
    found = Start.of(arguments)
    whole = token_windows(found.tokenizer, read_text(arguments.text), arguments.context)
    return replace(found, windows=spread(whole, arguments.windows))


def run(arguments: argparse.Namespace) -> None:
    """All rows that the files lack."""
    end = time.monotonic() + arguments.seconds
    start, found = _start(arguments), read(arguments.out)
    found |= {
        "machine": machine(),
        "model": arguments.model.name,
        "dense": evaluate(start.dense, start.windows).to_json(),
    }
    chosen = [row for row in rows(arguments.widths, arguments.only) if arguments.on_device or not row.needs_text]
    known = {
        (r["options"], r["bits"], r["seed"]) for path in (arguments.out, *arguments.known) for r in read(path)["rows"]
    }
    tasks = [task for row in chosen for task in (Task(row, seed) for seed in arguments.seeds) if task.key not in known]
    if not tasks:
        return
    if arguments.on_device:
        done = made_on_device(tasks, start, arguments)
    else:
        stats = _statistics(arguments, list(dict.fromkeys(task.seed for task in tasks)))
        _WORK.update(weights=start.weights, tasks=tasks, stats=stats)
        done = made_by_layers(arguments.jobs)
    for task, made, seconds in done:
        found["rows"].append({
            "recipe": task.row.recipe.name, "options": task.row.recipe.describe(), "bits": task.row.bits,
            "seed": task.seed, **totals(made), "seconds": seconds,
            **start.scores({name: each.matrix for name, each in made.items()}).to_json(),
        })  # fmt: skip
        write(arguments.out, found)
        print(_line(found["rows"][-1]), flush=True)
        if time.monotonic() > end:
            break


def _line(row: Mapping[str, Any]) -> str:
    return (
        "{recipe:<22} int{bits} seed {seed}  {bits_per_weight:6.3f} b  held {heldout:.4f}  nats {predicted_nats:.4f}  "
        "KL {kl:.4f}±{kl_error:.4f}  Δloss {delta_nats:+.4f}±{delta_nats_error:.4f}  ppl {perplexity:.2f} {seconds:.0f}"
    ).format(**row)


def main() -> None:
    """Parse the arguments and run."""
    own = parser(__doc__, out="results/recipes.json")
    own.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4])
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration windows and labels")
    own.add_argument("--only", default="", help="pattern of recipe names")
    own.add_argument("--on-device", action="store_true", help="in the first process, recipes that need text, too")
    own.add_argument("--known", type=Path, nargs="*", default=[], help="files whose rows are not made again")
    own.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    run(own.parse_args())


if __name__ == "__main__":
    main()
