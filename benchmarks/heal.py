"""Healing: matrix product operators against truncated SVD at the same bits, before and after the same fine-tune.

    python -m benchmarks.heal MODEL --calib TEXT --train TEXT [TEXT ...] --text TEXT --jobs 16 --out results/heal.json
    python -m benchmarks.heal --table --out results/heal.json

Every row stores at most ``--share`` of 16 bits a weight of the decoder's linear layers, factors in float16. Layers are
decomposed in processes of one thread, and each row is scored, healed and scored again as soon as it is whole. The rate
of every row is the best of ``--rates`` by KL on training windows kept apart, after ``--search`` steps. The JSON file is
written after every row, and rows it has are not computed again: ``--seconds`` stops early.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decomposed import decomposed
from benchmarks.portfolio import on_cpu
from benchmarks.results import read, write
from benchmarks.run import machine
from benchmarks.windows import spread
from tnc import BitsPerWeight, LayerStats, Recipe, calibrate, heal, load_stats, recipe
from tnc.models.evaluate import evaluate
from tnc.models.heal import HealReport
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.report import ModelReport
from tnc.models.text import Tokenizer, calibration_batches, full_windows, read_text, token_windows


def rows(share: float, only: str) -> list[Recipe]:
    """Truncated SVD and matrix product operators at ``16 * share`` bits a weight."""
    size = BitsPerWeight(16 * share)
    names = (
        "svd_pooled",
        "svd_fisher",
        "mpo_pooled",
        "mpo_modes",
        "mpo",
        "compactifai",
        "svd",
        "svd_llm",
        "mpo_low_rank",
    )
    ordered = recipe("mpo_ordered", rank=size).candidates[1]  # without the choice, which would decompose twice
    found = [
        *(recipe(name, rank=size) for name in names),
        recipe("blast", rank=size, blocks=8),
        recipe("mpo", rank=size, cores=3),
        recipe("compactifai", rank=size, cores=3),
        replace(ordered, name="mpo, sites ordered"),
    ]
    return [each for each in found if re.search(only, label(each))]


def label(each: Recipe) -> str:
    """Name of a row: the recipe, and its cores if it says how many."""
    cores = (each.options or {}).get("cores")
    return each.name if cores is None else f"{each.name}, {cores} cores"


@dataclass(frozen=True)
class Training:
    """How every row is healed."""

    batches: list[Tensor]
    kept: list[Tensor]  # training windows that choose the rate
    teacher: nn.Module
    rates: list[float]
    search: int
    block_steps: int
    logit_steps: int
    seed: int

    def healed(self, small: nn.Module) -> tuple[HealReport, dict[str, float], float]:
        """Heal in place: the report, KL on the kept windows by rate, and the rate taken."""
        kl = {}
        for rate in self.rates if len(self.rates) > 1 else ():
            tried = copy.deepcopy(small)
            self._run(tried, rate, self.search // 3, self.search - self.search // 3)
            kl[rate] = float(evaluate(tried, self.kept, reference=self.teacher, batch_size=16).kl or 0)
        best = min(kl, key=lambda rate: kl[rate]) if kl else self.rates[0]
        report = self._run(small, best, self.block_steps, self.logit_steps)
        return report, {str(rate): value for rate, value in kl.items()}, best

    def _run(self, small: nn.Module, rate: float, block_steps: int, logit_steps: int) -> HealReport:
        narrow = torch.bfloat16 if next(self.teacher.parameters()).is_cuda else None
        return heal(
            small, self.batches, teacher=self.teacher, block_steps=block_steps, logit_steps=logit_steps,
            learning_rate=rate, seed=self.seed, autocast=narrow,
        )  # fmt: skip


def row(each: Recipe, small: nn.Module, training: Training, windows: list[Tensor]) -> dict[str, Any]:
    """One row of the file: bits, errors, scores before and after, how it was healed."""
    fields = ModelReport.of(small).to_json()
    layers = fields.pop("layers")
    ranks = {name: report["bonds"] or report["rank"] for name, report in layers.items()}
    before = evaluate(small, windows, reference=training.teacher, batch_size=16).to_json()
    print(f"{label(each):<24} {fields['bits_per_weight']:.3f} b, nats {fields['predicted_nats']:.4f}, before: "
          f"perplexity {before['perplexity']:9.2f} KL {before['kl']:.4f}", flush=True)  # fmt: skip
    start = time.perf_counter()
    report, searched, rate = training.healed(small)
    after = evaluate(small, windows, reference=training.teacher, batch_size=16).to_json()
    print(f"{'':<24} after {time.perf_counter() - start:.0f} s at rate {rate}: perplexity {after['perplexity']:9.2f} "
          f"KL {after['kl']:.4f}", flush=True)  # fmt: skip
    return {
        **fields, "row": label(each), "ranks": ranks, "before": before, "after": after, "rate": rate,
        "searched": searched, "heal": report.to_json(),
        "tokens": (training.block_steps + training.logit_steps) * training.batches[0].numel(),
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Rows that the file lacks."""
    end = time.monotonic() + arguments.seconds
    device = torch.device(arguments.device)
    dense, tokenizer = load_model(arguments.model).to(device), load_tokenizer(arguments.model)
    windows = spread(token_windows(tokenizer, read_text(arguments.text), arguments.context), arguments.windows)
    found = read(arguments.out)
    given = {key: str(value) for key, value in vars(arguments).items()}
    base = evaluate(dense, windows, batch_size=16).to_json()
    found |= {"machine": machine(), "arguments": given, "dense": base}
    print(f"dense: perplexity {base['perplexity']:.2f}", flush=True)
    have = {each["row"] for each in found["rows"]}
    chosen = rows(arguments.share, arguments.only)
    todo = {number: each for number, each in enumerate(chosen) if label(each) not in have}
    if not todo:
        return
    stats, training = _statistics(arguments, dense, tokenizer), _training(arguments, dense, tokenizer)
    for number, small in decomposed(todo, dense, stats, jobs=arguments.jobs, backend=arguments.backend):
        if time.monotonic() > end:
            break
        found["rows"].append(row(chosen[number], small, training, windows))
        write(arguments.out, found)


def _statistics(arguments: argparse.Namespace, dense: nn.Module, tokenizer: Tokenizer) -> dict[str, LayerStats]:
    if arguments.stats is not None:
        return load_stats(arguments.stats)
    text = read_text(arguments.calib)
    batches = calibration_batches(tokenizer, text, context=arguments.context, sequences=128, seed=arguments.seed)
    return on_cpu(calibrate(dense, [batch.to(arguments.device) for batch in batches], seed=arguments.seed))


def _training(arguments: argparse.Namespace, dense: nn.Module, tokenizer: Tokenizer) -> Training:
    """All full windows of the training texts, shuffled once; the first ones choose the rate and are not trained on."""
    texts = [full_windows(tokenizer, read_text(path), context=arguments.context) for path in arguments.train]
    whole = torch.cat(texts)
    whole = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(arguments.seed))]
    kept, rest = whole[: arguments.kept], whole[arguments.kept :]
    batches = [batch for batch in torch.split(rest, arguments.batch) if len(batch) == arguments.batch]
    print(f"{len(batches)} training batches of {batches[0].numel()} tokens", flush=True)
    return Training(
        batches, list(kept), dense, arguments.rates, arguments.search, arguments.block_steps, arguments.logit_steps,
        arguments.seed,
    )  # fmt: skip


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table, by KL after healing."""
    yield f"dense: perplexity {found['dense']['perplexity']:.2f}"
    yield "| row | bits/weight | predicted nats | perplexity before | KL before | after | KL after | rate |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for each in sorted(found["rows"], key=lambda row: row["after"]["kl"]):
        before, after = each["before"], each["after"]
        yield (
            f"| {each['row']} | {each['bits_per_weight']:.3f} | {each['predicted_nats']:.3f} | "
            f"{before['perplexity']:.2f} | {before['kl']:.4f} ± {before['kl_error']:.4f} | {after['perplexity']:.2f} | "
            f"{after['kl']:.4f} ± {after['kl_error']:.4f} | {each['rate']} |"
        )


def main() -> None:
    """Read the command line; run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--train", nargs="+", type=Path, help="texts to heal on")
    parser.add_argument("--text", type=Path, help="held-out text to score")
    parser.add_argument("--calib", type=Path, help="calibration text, unless --stats is given")
    parser.add_argument("--stats", type=Path, help="statistics file")
    parser.add_argument("--share", type=float, default=0.5, help="of 16 bits a weight")
    parser.add_argument("--only", default="", help="pattern of row names")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="training windows a step")
    parser.add_argument("--kept", type=int, default=16, help="training windows that choose the rate")
    parser.add_argument("--windows", type=int, default=48, help="scored windows, spread over the text")
    parser.add_argument("--block-steps", type=int, default=150)
    parser.add_argument("--logit-steps", type=int, default=350)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.005, 0.01, 0.02], help="relative to each factor")
    parser.add_argument("--search", type=int, default=60, help="steps of each rate tried, a third of them on blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that decompose")
    parser.add_argument("--backend", default="auto", help="kernel of the factored layers")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/heal.json"))
    parser.add_argument("--table", action="store_true", help="print the table of --out")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table(read(arguments.out))))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
