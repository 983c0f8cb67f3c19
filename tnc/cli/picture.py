"""The picture of a comparison: perplexity against bits per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnc.errors import TNCError

_MARKS = {"svd": "o", "rtn": "s", "gptq": "D", "eora": "*"}


def draw_front(rows: Sequence[Mapping[str, Any]], dense_perplexity: float, path: Path) -> None:
    """Write a PNG: one point a recipe, a line at the dense model's perplexity, logarithmic upwards.

    Raises:
        TNCError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TNCError('pictures need matplotlib; install it with: pip install "tnc[plot]"') from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["recipe"].split("(")[0], []).append(row)
    for family, members in families.items():
        members = sorted(members, key=lambda row: row["bits_per_weight"])
        axes.plot(
            [row["bits_per_weight"] for row in members], [row["perplexity"] for row in members],
            marker=_MARKS.get(family, "o"), linestyle="-" if len(members) > 1 else "none", label=family,
        )  # fmt: skip
    axes.axhline(dense_perplexity, color="gray", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel="stored bits per weight of the compressed layers", ylabel="perplexity (log scale)", yscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
