"""Every recipe at about the same bits, over several samples of the calibration text, in one table.

    python -m benchmarks.recipes MODEL --calib TEXT --text TEXT --seeds 0 1 2 --jobs 8 --out results/recipes.json

A row is (recipe, bits, seed): bits per weight, held-out error, predicted nats, and KL, Δloss and perplexity on held-out
text beside the dense model. Layers are decomposed in processes of one thread, rows are scored by the first process,
written as they come, and not computed again when the command is repeated: ``--seconds`` stops it early.
``--table FILE ...`` prints what the files hold, mean ± spread over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.portfolio import on_cpu
from benchmarks.results import mean_and_spread, read, write
from benchmarks.run import machine
from benchmarks.windows import spread
from tnc import RECIPES, BitsPerWeight, LayerStats, Recipe, calibrate, compress, recipe
from tnc.decompose import measure
from tnc.decompose.best import decompose_by
from tnc.decompose.shared import decompose_shared
from tnc.errors import TNCError
from tnc.models.evaluate import evaluate
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.layers import select_layers, weight_of
from tnc.models.round_blocks import round_blocks
from tnc.models.sharing import sharing_groups
from tnc.models.text import calibration_batches, read_text, token_windows
from tnc.terms import map_tensors

# Cheap ones first: a run that is cut short then has most of the table.
_BASES = ("gptq", "rtn", "gptq_rotated", "quip")
_FACTORED = ("eora", "qera", "lqer", "lorc", "serq", "qlr_fisher", "qlr_shared", "loftq")
_SLOWER = ("yaqa_rotated_refined", "yaqa_refined", "yaqa_rotated", "yaqa", "gptq_refined", "awq_gptq")
_ALTERNATING = ("caldera", "svdquant", "qlr_alternating", "qlr_gated")
_WHOLE = ("odlri", "srr")  # take an integer rank
_SLOWEST = ("awq", "lwc", "hqq", "autoround", "omniquant")
_FLOAT_FACTORS = ("yaqa_lr", "quip_lr", "svdquant_smooth")
_TRELLIS = ("yaqa_trellis", "qtip")
_CHOSEN = ("best_at_bits",)  # takes the bits alone
_SIGNS = 0.01  # bits a weight that signs of rotations and padding of small layers may take


@dataclass(frozen=True)
class Row:
    """What one row of the table is made by."""

    bits: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """Name in the file."""
        return f"{self.recipe.describe()} @{self.bits}"


def rows(widths: list[int], only: str) -> Iterator[Row]:
    """Bases in groups of 64; with factors in groups of 128 at the same bits; trellises have a scale a row."""
    plain, coarse = {"group_size": 64}, {"group_size": 128, "factor_bits": 4}
    groups = (
        (_BASES, plain), (_FACTORED, coarse), (_SLOWER, plain), (_ALTERNATING, coarse), (_WHOLE, {**coarse, "rank": 6}),
        (_SLOWEST, plain), (_FLOAT_FACTORS, {"group_size": 128}), (_TRELLIS, {}),
        (("yaqa_trellis_lr",), {"factor_bits": 4}), (_CHOSEN, {}),
    )  # fmt: skip
    for name, options in ((name, options) for names, options in groups for name in names):
        if re.search(only, name):
            for bits in widths:
                limit = (
                    {"rank": BitsPerWeight(bits + (16 + bits) / 64 + _SIGNS)} if "rank" in RECIPES[name].options else {}
                )
                base = {} if name in _CHOSEN else {"bits": bits}
                yield Row(bits, recipe(name, **{**base, **limit, **options}))  # type: ignore[arg-type]


_WORK: dict[str, Any] = {}  # weights, statistics and rows, inherited by the processes


@dataclass(frozen=True)
class _Job:
    row: int
    layers: tuple[str, ...]


def _make(job: _Job) -> tuple[_Job, list[tuple[int, float, float, Any]] | str]:
    try:
        return job, _decomposed(job)
    except TNCError as error:  # a small layer may have no room for factors; the row is left out, and says so
        return job, f"{', '.join(job.layers)}: {error}"


def _decomposed(job: _Job) -> list[tuple[int, float, float, Any]]:
    torch.set_num_threads(1)
    made: Recipe = _WORK["rows"][job.row].recipe
    weights, stats = [_WORK["weights"][n] for n in job.layers], [_WORK["stats"][n] for n in job.layers]
    if len(job.layers) > 1:
        found = decompose_shared(weights, made.stages, stats, sweeps=made.sweeps)
    else:
        found = [decompose_by(weights[0], made, stats[0])]
    return [
        (each.report.storage_bits, float(each.report.predicted_nats or 0),
         float(each.report.heldout_relative_error or 0), each.operator.to_dense().float().numpy())
        for each in found
    ]  # fmt: skip


def _jobs(todo: list[int]) -> list[_Job]:
    """Layers of a row, those with one right factor together, the largest first."""
    found = []
    for number in todo:
        made, weights = _WORK["rows"][number].recipe, _WORK["weights"]
        groups = sharing_groups(dict.fromkeys(weights, made), _WORK["stats"])
        groups.sort(key=lambda names: -sum(weights[n].numel() for n in names))
        found += [_Job(number, tuple(names)) for names in groups]
    return found


def decomposed(todo: list[int], jobs: int) -> Iterator[tuple[int, dict[str, tuple[int, float, float, Tensor]]]]:
    """Rows that every layer takes, in order: number, and bits, nats, held-out error and matrix of every layer."""
    partial: dict[int, dict[str, tuple[int, float, float, Tensor]]] = {number: {} for number in todo}
    count = len(_WORK["weights"])
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for job, results in pool.imap_unordered(_make, _jobs(todo)):
            if isinstance(results, str):
                if partial.pop(job.row, None) is not None:
                    print(f"{_WORK['rows'][job.row].recipe.describe()} left out: {results}", flush=True)
                continue
            if job.row not in partial:
                continue
            for name, (bits, nats, heldout, matrix) in zip(job.layers, results, strict=True):
                partial[job.row][name] = bits, nats, heldout, torch.from_numpy(matrix)
            if len(partial[job.row]) == count:
                yield job.row, partial.pop(job.row)


def scored(
    row: Row, seed: int, made: Mapping[str, tuple[int, float, float, Tensor]], dense: nn.Module, windows: list[Tensor]
) -> dict[str, Any]:
    """One row of the file."""
    model = copy.deepcopy(dense)
    for name, (_, _, _, matrix) in made.items():
        weight_of(model.get_submodule(name)).data.copy_(matrix)
    elements = sum(matrix.numel() for *_, matrix in made.values())
    return {
        "recipe": row.recipe.name, "options": row.recipe.describe(), "bits": row.bits, "seed": seed,
        "bits_per_weight": sum(bits for bits, *_ in made.values()) / elements,
        "heldout": sum(heldout for _, _, heldout, _ in made.values()) / len(made),
        "predicted_nats": sum(nats for _, nats, *_ in made.values()),
        **evaluate(model, windows, reference=dense).to_json(),
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """All rows that the file lacks, seed by seed."""
    end = time.monotonic() + arguments.seconds
    device = torch.device(arguments.device)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    weights: dict[str, Tensor] = {n: weight_of(m).detach().clone() for n, m in select_layers(model).items()}
    dense = model.to(device)
    windows = spread(token_windows(tokenizer, read_text(arguments.text), 512), arguments.windows)
    found = read(arguments.out)
    found |= {"machine": machine(), "dense": evaluate(dense, windows).to_json()}
    chosen = list(rows(arguments.widths, arguments.only))
    for seed in arguments.seeds:
        have = {(each["options"], each["bits"], each["seed"]) for each in found["rows"]}
        todo = [i for i, row in enumerate(chosen) if (row.recipe.describe(), row.bits, seed) not in have]
        if not todo or time.monotonic() > end:
            continue
        _WORK.update(weights=weights, rows=chosen, stats=_statistics(arguments, dense, tokenizer, seed, device))
        for number, made in decomposed(todo, arguments.jobs):
            found["rows"].append(scored(chosen[number], seed, made, dense, windows))
            write(arguments.out, found)
            print(_line(found["rows"][-1]), flush=True)
            if time.monotonic() > end:
                break
        for row in chosen if arguments.blocks else ():
            learnt = Row(row.bits, replace(row.recipe, name=f"{row.recipe.name}_blocks"))
            if row.recipe.name != "gptq" or (learnt.recipe.describe(), row.bits, seed) in have:
                continue
            if time.monotonic() < end:
                found["rows"].append(_rounded_by_blocks(arguments, learnt, seed, dense, windows))
                write(arguments.out, found)
                print(_line(found["rows"][-1]), flush=True)


def _statistics(
    arguments: argparse.Namespace, dense: nn.Module, tokenizer: Any, seed: int, device: torch.device,  # noqa: ANN401
) -> dict[str, LayerStats]:  # fmt: skip
    text = read_text(arguments.calib)
    batches = calibration_batches(tokenizer, text, context=512, sequences=arguments.sequences, seed=seed)
    return on_cpu(calibrate(dense, [batch.to(device) for batch in batches], seed=seed))


def _rounded_by_blocks(
    arguments: argparse.Namespace, row: Row, seed: int, dense: nn.Module, windows: list[Tensor]
) -> dict[str, Any]:
    """A row whose codes are then learnt against the outputs of blocks, on the device of ``dense``."""
    device = next(dense.parameters()).device
    plain = copy.deepcopy(dense).cpu()
    small = compress(plain, row.recipe, stats=_WORK["stats"]).to(device)
    batches = calibration_batches(
        load_tokenizer(arguments.model),
        read_text(arguments.calib),
        context=512,
        sequences=arguments.sequences,
        seed=seed,
    )
    round_blocks(small, [batch.to(device) for batch in batches], teacher=dense, steps=arguments.blocks, seed=seed)
    made = {}
    for name in _WORK["weights"]:
        operator = small.get_submodule(name).operator
        matrix = operator.to_dense().float().cpu()
        report = measure(_WORK["weights"][name], map_tensors(operator, lambda t: t.cpu()), _WORK["stats"][name])
        heldout, nats = float(report.heldout_relative_error or 0), float(report.predicted_nats or 0)
        made[name] = report.storage_bits, nats, heldout, matrix
    return scored(row, seed, made, dense, windows)


def _line(row: Mapping[str, Any]) -> str:
    return (
        "{recipe:<22} int{bits} seed {seed}  {bits_per_weight:6.3f} b  held {heldout:.4f}  nats {predicted_nats:.4f}  "
        "KL {kl:.4f}±{kl_error:.4f}  Δloss {delta_nats:+.4f}±{delta_nats_error:.4f}  ppl {perplexity:.3f}"
    ).format(**row)


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table: mean over seeds, ± their standard deviation, by bits and KL."""
    yield "| recipe | seeds | bits/weight | held-out error | predicted nats | KL | Δloss |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["bits"], row["recipe"]), []).append(row)
    for (bits, name), each in sorted(groups.items(), key=lambda g: (g[0][0], statistics.mean(r["kl"] for r in g[1]))):
        keys = ("heldout", "predicted_nats", "kl", "delta_nats")
        figures = " | ".join(mean_and_spread([row[key] for row in each]) for key in keys)
        stored = statistics.mean(row["bits_per_weight"] for row in each)
        yield f"| `{name}` {bits} bits | {len(each)} | {stored:.3f} | {figures} |"


def main() -> None:
    """Parse the arguments; run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens, evenly spread over the text")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration windows and labels")
    parser.add_argument("--only", default="", help="pattern of recipe names")
    parser.add_argument(
        "--blocks", type=int, default=0, help="steps of rounding GPTQ's codes against their blocks, too"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/recipes.json"))
    parser.add_argument("--table", type=Path, nargs="*", help="print the table of these files, or of --out")
    arguments = parser.parse_args()
    if arguments.table is not None:
        files = [read(path) for path in arguments.table or [arguments.out]]
        print("\n".join(table({"rows": [row for found in files for row in found["rows"]]})))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
