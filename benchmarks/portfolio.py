"""Many options for every layer, in parallel: each alone over the whole model, the best at given bits, and planned.

    python -m benchmarks.portfolio MODEL --calib TEXT --text TEXT --jobs 16 --out results/portfolio.json

Every layer is decomposed by every option once, in processes of one thread. Rows are then put together from the same
operators: one option everywhere; at ``--bits`` the option of least predicted nats of each layer among those within
these bits (the choice of recipe ``best_at_bits``, over more options); and at ``--budgets`` the choice of least
predicted nats of the whole model within the bits of all layers together (`tnc.planning.allocate`). Scored by
held-out text against the dense model, the operators rounded once to float32.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.results import write
from benchmarks.run import machine
from benchmarks.windows import spread
from tnc import IntFormat, LayerStats, LowRankStage, Moments, QuantizeStage, Recipe, calibrate
from tnc.decompose import InputRotation, OutputRotation
from tnc.decompose.best import decompose_by
from tnc.models.evaluate import Evaluation, evaluate
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.layers import select_layers, weight_of
from tnc.models.text import calibration_batches, read_text, token_windows
from tnc.planning.allocate import Menu, allocate

_ROTATED = (InputRotation(), OutputRotation())


def options(widths: list[int], group: int, rank: int) -> dict[str, Recipe]:
    """Two-sided rounding with refinement at each width, rotated or not, with 4-bit factors or not, and plain GPTQ."""
    found = {}
    for bits in widths:
        best = QuantizeStage(IntFormat(bits, group), method="yaqa", refine=3)
        factors = LowRankStage(rank, factor_format=IntFormat(4))
        found[f"gptq int{bits}"] = Recipe("gptq", (QuantizeStage(IntFormat(bits, group)),))
        found[f"yaqa refined int{bits}"] = Recipe("yaqa refined", (best,))
        found[f"rotated yaqa refined int{bits}"] = Recipe("rotated", (best,), transforms=_ROTATED)
        if bits < 4 and rank:
            found[f"rotated yaqa refined int{bits} + rank {rank}"] = Recipe("lr", (best, factors), transforms=_ROTATED)
    return found


@dataclass(frozen=True, eq=False)
class Made:
    """One layer by one option: bits, predicted nats, held-out error, and the matrix as stored."""

    bits: int
    nats: float
    heldout: float
    matrix: Tensor


_WORK: dict[str, Any] = {}  # weights, statistics and options, inherited by the processes


def _make(job: tuple[str, str]) -> tuple[str, str, int, float, float, Any]:
    option, layer = job
    torch.set_num_threads(1)
    found = decompose_by(_WORK["weights"][layer], _WORK["options"][option], _WORK["stats"][layer])
    report, matrix = found.report, found.operator.to_dense().float().numpy()
    return (
        option,
        layer,
        report.storage_bits,
        float(report.predicted_nats or 0),
        float(report.heldout_relative_error or 0),
        matrix,
    )


def make_all(
    weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats], recipes: Mapping[str, Recipe], jobs: int
) -> dict[str, dict[str, Made]]:
    """Option -> layer -> what it became."""
    _WORK.update(weights=weights, stats=stats, options=recipes)
    todo = sorted(((o, n) for o in recipes for n in weights), key=lambda job: -weights[job[1]].numel())
    made: dict[str, dict[str, Made]] = {name: {} for name in recipes}
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for option, layer, bits, nats, heldout, matrix in pool.imap_unordered(_make, todo):
            made[option][layer] = Made(bits, nats, heldout, torch.from_numpy(matrix))
    return made


def planned(made: Mapping[str, Mapping[str, Made]], layers: list[str], limit: float) -> dict[str, str]:
    """Option of each layer: least predicted nats of all layers within ``limit`` bits altogether."""
    names = list(made)
    count = len(names)
    cost = np.array([made[name][layer].nats for layer in layers for name in names])
    usage = np.array([float(made[name][layer].bits) for layer in layers for name in names])
    chosen = allocate(Menu(np.arange(0, len(cost) + 1, count), cost, usage), limit).chosen
    return {layer: names[int(at) % count] for layer, at in zip(layers, chosen, strict=True)}


def best_within(made: Mapping[str, Mapping[str, Made]], weights: Mapping[str, Tensor], bits: float) -> dict[str, str]:
    """Option of each layer: least predicted nats within ``bits`` per weight of that layer."""
    return {
        layer: min(
            (name for name in made if made[name][layer].bits <= bits * weight.numel()),
            key=lambda n: made[n][layer].nats,
        )
        for layer, weight in weights.items()
    }


def score(
    name: str,
    choice: Mapping[str, str],
    made: Mapping[str, Mapping[str, Made]],
    dense: nn.Module,
    windows: list[Tensor],
) -> dict[str, Any]:
    """Bits, prediction, held-out error and held-out text of one choice."""
    model = copy.deepcopy(dense)
    for layer, option in choice.items():
        weight = weight_of(model.get_submodule(layer))
        weight.data.copy_(made[option][layer].matrix)
    measured: Evaluation = evaluate(model, windows, reference=dense)
    rows = [made[option][layer] for layer, option in choice.items()]
    elements = sum(row.matrix.numel() for row in rows)
    found = {
        "name": name, "bits_per_weight": sum(row.bits for row in rows) / elements,
        "predicted_nats": sum(row.nats for row in rows), "heldout": sum(row.heldout for row in rows) / len(rows),
        **measured.to_json(), "options": {o: list(choice.values()).count(o) for o in dict.fromkeys(choice.values())},
    }  # fmt: skip
    print(
        "{name:<36} {bits_per_weight:6.3f} b  held {heldout:.4f}  nats {predicted_nats:.4f}  KL {kl:.4f}±{kl_error:.4f}"
        "  Δloss {delta_nats:+.4f}±{delta_nats_error:.4f}  ppl {perplexity:.3f}".format(**found), flush=True,
    )  # fmt: skip
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows on one model."""
    device = torch.device(arguments.device)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    weights = {n: weight_of(layer).detach().clone() for n, layer in select_layers(model).items()}
    dense = model.to(device)
    batches = calibration_batches(
        tokenizer, read_text(arguments.calib), context=512, sequences=arguments.sequences, seed=arguments.seed
    )
    stats = on_cpu(calibrate(dense, [batch.to(device) for batch in batches], seed=arguments.seed))
    windows = spread(token_windows(tokenizer, read_text(arguments.text), 512), arguments.windows)
    print(f"dense: perplexity {evaluate(dense, windows).perplexity:.3f}", flush=True)
    start = time.perf_counter()
    made = make_all(weights, stats, options(arguments.widths, arguments.group_size, arguments.rank), arguments.jobs)
    print(f"{len(made)} options of {len(weights)} layers: {time.perf_counter() - start:.0f} s", flush=True)
    elements = sum(weight.numel() for weight in weights.values())
    choices = {name: dict.fromkeys(weights, name) for name in made}
    choices |= {f"best at {bits} bits": best_within(made, weights, bits) for bits in arguments.bits}
    choices |= {f"planned at {bits} bits": planned(made, list(weights), bits * elements) for bits in arguments.budgets}
    rows = [score(name, choice, made, dense, windows) for name, choice in choices.items()]
    return {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows}


def on_cpu(stats: Mapping[str, LayerStats]) -> dict[str, LayerStats]:
    """The same statistics on the CPU; what layers share stays shared."""
    moved: dict[int, Moments] = {}

    def move(moments: Moments | None) -> Moments | None:
        if moments is None:
            return None
        mean_abs = None if moments.mean_abs is None else moments.mean_abs.cpu()
        return moved.setdefault(id(moments), replace(moments, second=moments.second.cpu(), mean_abs=mean_abs))

    return {
        name: LayerStats(move(each.inputs) or each.inputs, move(each.heldout), move(each.gradient), each.notes)
        for name, each in stats.items()
    }


def main() -> None:
    """Parse the arguments, run, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64, help="evenly spread over the text")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16, help="of the 4-bit factors; 0 leaves them out")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.32, 3.32, 4.32])
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.4, 2.8, 3.3, 4.3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/portfolio.json"))
    arguments = parser.parse_args()
    result = run(arguments)
    write(arguments.out, result)


if __name__ == "__main__":
    main()
