"""Whole models by two-sided rounding on trellises of more and more states, at the same stored bits.

    python -m benchmarks.trellis_states MODEL --stats STATS --text TEXT --states 12 14 16

For each: stored bits a weight, predicted nats, measured KL to the dense model and perplexity on spread windows, and the
seconds of rounding.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write
from benchmarks.run import machine
from benchmarks.windows import spread
from tnc import ModelReport, compress, load_stats, recipe
from tnc.models.evaluate import evaluate_many
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import read_text, token_windows


def main() -> None:
    """Compress, score and print, one number of states after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--states", type=int, nargs="+", default=[12, 14, 16])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("results/trellis_states.json"))
    arguments = parser.parse_args()
    model, stats = load_model(arguments.model), load_stats(arguments.stats)
    windows = token_windows(load_tokenizer(arguments.model), read_text(arguments.text), arguments.context)
    windows = spread(windows, arguments.windows)
    rows: list[dict[str, Any]] = []
    for states in arguments.states:
        start = time.perf_counter()
        coded = recipe("yaqa_trellis", bits=arguments.bits, state_bits=states)
        small = compress(model, coded, stats=stats, dtype=torch.float16)
        seconds = time.perf_counter() - start
        fields = ModelReport.of(small).to_json()
        fields.pop("layers")
        score = evaluate_many({"small": small}, windows, reference=model)["small"].to_json()
        rows.append({"states": states, "seconds": seconds, **fields, **score})
        print(
            "{states} state bits: {bits_per_weight:.3f} bits a weight, predicted {predicted_nats:.4f} nats, "
            "KL {kl:.4f} ± {kl_error:.4f}, perplexity {perplexity:.3f}, {seconds:.0f} s".format(**rows[-1]),
            flush=True,
        )
    write(arguments.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
