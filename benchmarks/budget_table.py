"""Markdown of result files of `benchmarks.budgets`: a table a model and calibration text, means over the seeds.

    python -m benchmarks.budget_table results/budgets.json [MORE.json ...]

Several files are parts of one table. Printed under it is whether planned models have less KL than uniform ones, bits
alone and rank alone at every budget, seed by seed.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import mean_and_spread, read

Row = Mapping[str, Any]

_COLUMNS = ("budget", "plan", "seeds", "bits/weight", "predicted nats", "KL", "Δloss", "perplexity")
_BOLD = ("planned", "planned of all")
_OTHERS = ("rank only", "bits only", "uniform", "uniform + factors")
_FIGURES = (("predicted_nats", ""), ("kl", ""), ("delta_nats", "+"))


def tables(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of all tables of some files."""
    rows = [row for each in found for row in each["rows"]]
    dense = {name: scores for each in found for name, scores in each["dense"].items()}
    for subject in dict.fromkeys(row["model"] for row in rows):
        chosen = [row for row in rows if row["model"] == subject]
        yield f"{subject}, dense perplexity {dense[subject]['perplexity']:.3f}\n"
        yield from table(chosen)
        yield ""
        yield from least_at_every_budget(chosen)
        yield ""


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One line a budget and plan, by budget and falling KL: mean ± standard deviation over the seeds."""
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "| --- " * len(_COLUMNS) + "|"
    for (budget, kind), each in sorted(_by_plan(rows).items(), key=lambda g: (g[0][0], -_mean(g[1], "kl"))):
        shown = f"{budget:g}" if each[0]["budget"] else "-"
        name = re.sub(r"trellis(\d)_diagonal", r"trellis, \1 bits", f"**{kind}**" if kind in _BOLD else kind)
        digits = 4 if _mean(each, "kl") < 1 else 3
        figures = [mean_and_spread([row[key] for row in each], digits, sign) for key, sign in _FIGURES]
        cells = (shown, name, f"{len(each)}", f"{_mean(each, 'bits_per_weight'):.3f}", *figures,
                 mean_and_spread([row["perplexity"] for row in each], 2))  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def least_at_every_budget(rows: Sequence[Row]) -> Iterator[str]:
    """For each budget and kind of plan: in how many seeds it is below what others do, and how far."""
    for budget in sorted({row["budget"] for row in rows if row["kind"] in _OTHERS}):
        here = [row for row in rows if row["budget"] == budget]
        for kind in dict.fromkeys(row["kind"] for row in here if row["kind"].startswith("planned")):
            shares = []
            for seed in sorted({row["seed"] for row in here}):
                kls = {row["kind"]: row["kl"] for row in here if row["seed"] == seed}
                if kind in kls:
                    shares.append(kls[kind] / min(kls[name] for name in _OTHERS if name in kls))
            wins = sum(share < 1 for share in shares)
            yield (f"{budget:g} bits: {kind} has the least KL in {wins} of {len(shares)} seeds, "
                   f"{mean_and_spread(shares, 3)} of the best of the others")  # fmt: skip


def _by_plan(rows: Sequence[Row]) -> dict[tuple[float, str], list[Row]]:
    """(budget, kind) -> rows; those without a budget stand at the bits they have."""
    kinds: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["budget"], row["kind"]), []).append(row)
    return {(budget or _mean(each, "bits_per_weight"), kind): each for (budget, kind), each in kinds.items()}


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    print("\n".join(tables([read(path) for path in parser.parse_args().files])))


if __name__ == "__main__":
    main()
