"""``tnc sensitivity``: what every layer of a model loses at each size of a form, as a table, data and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tnc.cli import console
from tnc.cli.sources import context_of, open_model, open_text, resolve_device
from tnc.decompose import BitsPerWeight, LowRankStage, MpoStage, Size
from tnc.decompose.forms import FormStage, blast
from tnc.errors import RecipeError, TNCError
from tnc.models.sensitivity import Sensitivity, sensitivity
from tnc.models.text import token_windows
from tnc.stats_file import load_stats

FORMS: dict[str, Any] = {
    "svd": LowRankStage, "mpo": MpoStage, "blast": partial(FormStage, partial(blast, blocks=(4, 4))),
}  # fmt: skip

TITLES = {"kl": "measured KL, nats"}

_DECADES = 1e4  # between the lowest and the highest colour


@dataclass(frozen=True)
class SensitivityOptions:
    """What the user asked for; see ``tnc sensitivity --help``."""

    model: str
    stats: Path
    form: str
    ranks: list[int]
    bits: list[float]
    include: list[str] | None
    text: str | None
    windows: int
    device: str
    out: Path | None


def run_sensitivity(options: SensitivityOptions, *, as_json: bool) -> None:
    """Decompose, print, and draw where asked."""
    if options.form not in FORMS:
        raise RecipeError(f"unknown form {options.form!r}; expected one of {', '.join(FORMS)}.")
    model, tokenizer = open_model(options.model, device=resolve_device(options.device))
    windows = None
    if options.text is not None:
        whole = list(token_windows(tokenizer, open_text(options.text, "evaluation"), context_of(model)))
        windows = whole[:: max(len(whole) // options.windows, 1)][: options.windows]
    sizes: list[Size] = [*options.ranks, *(BitsPerWeight(bits) for bits in options.bits)]
    if not sizes:
        raise RecipeError("tnc sensitivity got no size; give --rank or --bpw, each as often as you like.")
    with console.progress_bars() as progress:
        found = sensitivity(
            model.float(), load_stats(options.stats), FORMS[options.form], sizes, include=options.include,
            windows=windows, progress=progress,
        )  # fmt: skip
    if options.out is not None:
        draw_sensitivity(found, options.out, title=f"{Path(options.model).name}, {options.form}")
    if as_json:
        console.print_json(found.to_json())
        return
    field = "predicted_nats" if all(row.predicted_nats is not None for row in found.rows) else "relative_error"
    for each in (field, *(["kl"] if options.text is not None else [])):
        rows = [
            (name, *(console.number(value, 3) for value in line))
            for name, line in zip(found.layers, found.grid(each), strict=True)
        ]
        console.print_table(TITLES.get(each, each).replace("_", " "), ("layer", *found.sizes), rows)


def draw_sensitivity(found: Sensitivity, path: Path, *, title: str) -> None:
    """Write maps, layers × sizes: relative error (held out where known), predicted nats, and measured KL if any.

    Raises:
        TNCError: if matplotlib is not installed.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TNCError('pictures need matplotlib; install it with: pip install "tnc[plot]"') from error
    heldout = any(row.heldout_relative_error is not None for row in found.rows)
    fields = ["heldout_relative_error" if heldout else "relative_error", "predicted_nats"]
    fields += ["kl"] if any(row.kl is not None for row in found.rows) else []
    figure = Figure(
        figsize=(1 + len(fields) * (1.8 + 0.55 * len(found.sizes)), 1.6 + 0.16 * len(found.layers)),
        layout="constrained",
    )
    for axes, field in zip(figure.subplots(1, len(fields), sharey=True), fields, strict=True):
        values = [[float("nan") if v is None else max(v, 1e-12) for v in line] for line in found.grid(field)]
        known = [v for line in values for v in line if v == v]
        if not known:
            axes.axis("off")
            continue
        low = max(min(known), max(known) / _DECADES)  # what is exact to rounding takes the lowest colour
        norm = LogNorm(low, max(known)) if max(known) > low else None
        image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
        axes.set_xticks(range(len(found.sizes)), found.sizes, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(found.layers)), found.layers, fontsize=5)
        axes.set_title(TITLES.get(field, field).replace("_", " "), fontsize=9)
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=200)
