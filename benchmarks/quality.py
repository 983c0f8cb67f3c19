"""Quality of many recipes on one model: bits, errors, predicted nats, measured KL and perplexity.

    python -m benchmarks.quality MODEL --calib TEXT --text TEXT --out results/quality.json

Statistics are computed once, every variant is compressed from them, and all variants are scored together
with the dense model on the same windows. `benchmarks.quality_table` prints the results as Markdown, with what
the prediction is worth.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality_table import prediction
from benchmarks.results import write
from benchmarks.run import machine
from benchmarks.windows import spread
from tnc import BitsPerWeight, LayerStats, ModelReport, Recipe, calibrate, compress, load_stats, recipe
from tnc.models.evaluate import evaluate_many
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import Tokenizer, calibration_batches, read_text, token_windows


def variants(group_size: int, only: str) -> list[Recipe]:
    """Low rank at 80 and 60 % of the parameters, quantized, and quantized + low rank; names matching ``only``."""
    sizes = [BitsPerWeight(16 * share) for share in (0.8, 0.6)]
    found = [recipe(n, rank=size) for size in sizes for n in ("svd", "asvd", "svd_llm", "svd_fisher", "svd_pooled")]
    for bits in (3, 4, 2):
        base = {"bits": bits, "group_size": group_size or None}
        found += [recipe(n, **base) for n in ("rtn", "gptq", "gptq_refined", "yaqa", "yaqa_refined")]
        found += [recipe("eora", **base, rank=rank) for rank in (8, 16, 32)]
        found += [recipe(name, **base, rank=16) for name in ("qlr_fisher", "qera", "lqer", "lorc")]
    return [each for each in found if re.search(only, each.describe())]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of all variants on one model."""
    device = torch.device(arguments.device)
    model, tokenizer = load_model(arguments.model, device=device), load_tokenizer(arguments.model)
    stats = _statistics(arguments, model, tokenizer)
    windows = spread(token_windows(tokenizer, read_text(arguments.text), arguments.context), arguments.windows)
    chosen = variants(arguments.group_size, arguments.only)
    dense = evaluate_many({"dense": model}, windows)["dense"].to_json()
    print(f"dense: perplexity {dense['perplexity']:.3f} on {dense['tokens']} tokens", flush=True)
    result: dict[str, Any] = {
        "machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}, "dense": dense,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for at in range(0, len(chosen), arguments.together):
        group = {each.describe(): each for each in chosen[at : at + arguments.together]}
        small = {name: compress(model, each, stats=stats, dtype=torch.float16) for name, each in group.items()}
        scores = evaluate_many(small, windows, reference=model)
        for name, each in group.items():
            fields = ModelReport.of(small[name]).to_json()
            fields.pop("layers")
            rows.append({"name": each.name, **fields, **scores[name].to_json(), "options": str(each.options)})
            _print(rows[-1])
        write(arguments.out, {**result, "rows": rows})  # a run that is cut short keeps what it has
    return {**result, "rows": rows, "prediction": prediction(rows)}


def _statistics(arguments: argparse.Namespace, model: nn.Module, tokenizer: Tokenizer) -> dict[str, LayerStats]:
    if arguments.stats is not None:
        return load_stats(arguments.stats)
    batches = calibration_batches(
        tokenizer, read_text(arguments.calib), context=arguments.context, sequences=arguments.sequences,
        seed=arguments.seed,
    )  # fmt: skip
    start = time.perf_counter()
    stats = calibrate(model, [batch.to(arguments.device) for batch in batches], seed=arguments.seed)
    print(f"calibration: {time.perf_counter() - start:.1f} s", flush=True)
    return stats


def _print(row: dict[str, Any]) -> None:
    line = (
        "{recipe:<58} {bits_per_weight:6.3f} b  err {relative_error:.4f} held {heldout_relative_error:.4f}"
        "  bound {lower_bound:.4f}  nats {predicted_nats:.4f}  KL {kl:.4f}±{kl_error:.4f}"
        "  Δloss {delta_nats:+.4f}±{delta_nats_error:.4f}  ppl {perplexity:.2f}  {seconds:.1f} s"
    )
    print(line.format(**row), flush=True)


def main() -> None:
    """Parse the arguments, run, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--calib", type=Path, help="text to calibrate on")
    source.add_argument("--stats", type=Path, help="file of tnc.save_stats instead")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, help="score only so many, evenly spread over the text")
    parser.add_argument("--group-size", type=int, default=64, help="0 is one group a row")
    parser.add_argument("--only", default="", help="regular expression on the recipe and its options")
    parser.add_argument("--together", type=int, default=4, help="models held in memory at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/quality.json"))
    arguments = parser.parse_args()
    result = run(arguments)
    write(arguments.out, result)


if __name__ == "__main__":
    main()
