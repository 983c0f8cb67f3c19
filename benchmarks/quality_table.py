"""Markdown of result files of `benchmarks.quality`: the table of one model and what its prediction is worth.

    python -m benchmarks.quality_table results/quality.json [MORE.json ...]

Several files are parts of one table (same model, same windows; `--only` splits a run).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

_COLUMNS = (
    "recipe", "bits/weight", "held-out error", "lower bound", "predicted nats", "KL (± s.e.)", "Δloss (± s.e.)",
    "perplexity",
)  # fmt: skip
_ROW = (
    "| {label} | {bits_per_weight:.2f} | {heldout_relative_error:.4f} | {lower_bound:.4f} | {predicted_nats:.4f} "
    "| {kl:.4f} ± {kl_error:.4f} | {delta_nats:+.4f} ± {delta_nats_error:.4f} | {perplexity:.2f} |"
)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a variant, by width and then by the order of the run."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (_COLUMNS, ["---"] * len(_COLUMNS))]
    lines += [_ROW.format(label=label(row), **row) for row in sorted(rows, key=_width)]
    return "\n".join(lines)


def label(row: dict[str, Any]) -> str:
    """``gptq(bits=3)`` as `` `gptq` int3 ``."""
    found = f"`{row['name']}`"
    if bits := re.search(r"bits=(\d)", row["recipe"]):
        found += f" int{bits[1]}"
    if share := re.search(r"value=([\d.]+)", row["recipe"]):
        return found + f" at {float(share[1]) / 16:.0%} of the parameters"
    rank = re.search(r"rank=(\d+)", row["recipe"])
    return found + (f" rank {rank[1]}" if rank else "")


def prediction(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation of predicted nats with measured KL and loss; KL / predicted by size of the prediction."""
    nats, kl, loss = ([row[key] for row in rows] for key in ("predicted_nats", "kl", "delta_nats"))
    found: dict[str, Any] = {
        "variants": len(rows), "spearman_kl": float(spearmanr(nats, kl).statistic),
        "spearman_loss": float(spearmanr(nats, loss).statistic),
        "spearman_kl_of_h_error": float(spearmanr([r["heldout_relative_error"] for r in rows], kl).statistic),
    }  # fmt: skip
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 100)):
        ratios = sorted(b / a for a, b in zip(nats, kl, strict=True) if low <= a < high)
        if ratios:
            found[f"KL/predicted in [{low}, {high})"] = [len(ratios), ratios[0], ratios[len(ratios) // 2], ratios[-1]]
    return found


def _width(row: dict[str, Any]) -> int:
    bits = re.search(r"bits=(\d)", row["recipe"])
    return int(bits[1]) if bits else 99


def main() -> None:
    """Print the table and the prediction as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parts = [json.loads(path.read_text()) for path in parser.parse_args().files]
    if len({json.dumps(part["dense"]["perplexity"]) for part in parts}) > 1:
        parser.error("the files are of different models or windows: their dense perplexities differ.")
    rows = [row for part in parts for row in part["rows"]]
    dense = parts[0]["dense"]
    print(f"Dense: perplexity {dense['perplexity']:.3f} on {dense['tokens']:,} scored tokens.\n")
    print(table(rows))
    print(json.dumps(prediction(rows), indent=1))


if __name__ == "__main__":
    main()
