"""Rows of `benchmarks.recipes` that tables of the documentation are made of: one CSV file beside the code."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "rows" / "recipes.csv"

Found = Mapping[str, Any]

_KEY = ("model", "calib", "recipe", "options", "bits", "seed")
_FIGURES = (
    "bits_per_weight", "heldout", "predicted_nats", "kl", "kl_error", "delta_nats", "delta_nats_error", "perplexity",
)  # fmt: skip


def load(path: Path = PATH) -> list[Found]:
    """All rows; figures are numbers, those that a row lacks are left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_typed(row) for row in csv.DictReader(file)]


def add(kept: Iterable[Found], new: Iterable[Found]) -> list[Found]:
    """Rows with others in the place of those of the same model, text, recipe, bits and seed; sorted by these."""
    found = {tuple(str(row[key]) for key in _KEY): row for row in (*kept, *new)}
    return [found[key] for key in sorted(found)]


def save(rows: Iterable[Found], path: Path = PATH) -> None:
    """Write the file, figures to six digits."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*_KEY, *_FIGURES))
        for row in rows:
            figures = (f"{row[key]:.6g}" if key in row else "" for key in _FIGURES)
            writer.writerow((*(row[key] for key in _KEY), *figures))


def _typed(row: Mapping[str, str]) -> Found:
    figures = {key: float(row[key]) for key in _FIGURES if row[key]}
    return {key: row[key] for key in _KEY} | figures | {"bits": int(row["bits"]), "seed": int(row["seed"])}
