"""The picture of a plan: the front with the chosen point, bits over depth, error against bits, and curves over rank.

Where the layers were measured alone, also what each costs against its prediction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnc.errors import TNCError
from tnc.planning import CurveTable, ErrorCurve, Plan

_LABEL = {"boxstyle": "round,pad=0.15", "facecolor": "black", "alpha": 0.35, "linewidth": 0}
_MARKERS = "osD^vPX*"  # by kind of layer
_DIGITS = re.compile(r"\.(\d+)\.")


def draw_plan(path: Path, table: CurveTable, front: Sequence[Mapping[str, float]], plan: Plan | None) -> None:
    """Write a PNG of four panels; two without a plan, six where its layers were measured alone.

    Raises:
        TNCError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TNCError('pictures need matplotlib; install it with: pip install "tnc[plot]"') from error
    measured = plan is not None and plan.measured_alone
    rows = 1 + (plan is not None) + measured
    figure = Figure(figsize=(13, 4.8 * rows - 0.6 * (rows > 1)), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    _draw_front(axes[0][0], table, front, plan)
    _draw_ranks(axes[0][1], table)
    if plan is not None:
        _draw_map(figure, axes[1][0], plan)
        _draw_layers(axes[1][1], plan)
    if plan is not None and measured:
        _draw_measured(axes[2][0], plan)
        _draw_ratios(axes[2][1], plan)
    figure.savefig(path, dpi=130)


def _kind(name: str) -> str:
    """The layer's place in its block: ``mlp.up_proj``; experts of one block are one kind."""
    last = list(_DIGITS.finditer(name))
    return re.sub(r"\.\d+", "", name[last[0].end() :] if last else name)


def _block(name: str) -> int:
    found = _DIGITS.search(name)
    return int(found[1]) if found else 0


def _unit(table: CurveTable) -> str:
    option = next(iter(table.layers.values())).options[0]
    return "predicted nats" if option.nats == option.nats else "sum of squared relative errors"


def _draw_front(axes: Any, table: CurveTable, front: Sequence[Mapping[str, float]], plan: Plan | None) -> None:  # noqa: ANN401
    points = [(p["bits_per_weight"], p["value"]) for p in front if p["value"] > 0]
    scale = 1.0 if plan is None else plan.scale
    axes.plot([b for b, _ in points], [scale * v for _, v in points], color="tab:blue", label="best plans")
    if plan is not None and plan.predicted_nats is not None:
        axes.plot(plan.bits_per_weight, plan.predicted_nats, "o", color="tab:red", markersize=9, label="this plan")
        if plan.measured is not None:
            axes.plot(plan.bits_per_weight, plan.measured["kl"], "x", color="black", markersize=9, label="measured KL")
    axes.set(yscale="log", xlabel="stored bits per weight", ylabel=_unit(table), title="Front of the whole model")
    axes.set_xlim(right=min(8.5, max((b for b, _ in points), default=8.5)))
    axes.set_ylim(bottom=max(scale * min((v for b, v in points if b <= 8.5), default=1e-6) / 2, 1e-9))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")


def _draw_ranks(axes: Any, table: CurveTable) -> None:  # noqa: ANN401
    """The mean over layers of what a rank leaves of the error of its base: the spectra of the residuals."""
    for base in table.portfolio.bases:
        curves = [c for layer in table.layers.values() for c in layer.curves
                  if c.base == base and c.factors == "16" and not c.shared and len(c.options) > 1]  # fmt: skip
        if not curves:
            continue
        ranks = [option.choice.rank for option in max(curves, key=lambda c: len(c.options)).options]
        having = [[c for c in curves if len(c.options) > k] for k in range(len(ranks))]
        ranks = [rank for rank, some in zip(ranks, having, strict=True) if 2 * len(some) >= len(curves)]
        left = [_left(having[k], k) for k in range(len(ranks))]
        axes.plot(ranks, left, marker=".", label=base)
    axes.set(
        xlabel="rank",
        ylabel="squared error left, share of the first point",
        title="What a rank takes off, mean over layers",
    )
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(alpha=0.3)


def _left(curves: Sequence[ErrorCurve], at: int) -> float:
    """Mean of the squared error left, as a share of the first point's."""
    return sum((c.options[at].heldout_error / c.options[0].heldout_error) ** 2 for c in curves) / len(curves)


def _draw_map(figure: Any, axes: Any, plan: Plan) -> None:  # noqa: ANN401
    kinds = list(dict.fromkeys(_kind(name) for name in plan.layers))
    blocks = sorted({_block(name) for name in plan.layers})
    cells: dict[tuple[int, int], list[Any]] = {}
    for name, layer in plan.layers.items():
        cells.setdefault((kinds.index(_kind(name)), blocks.index(_block(name))), []).append(layer)
    grid = [[float("nan")] * len(blocks) for _ in kinds]
    for (row, column), layers in cells.items():
        elements = sum(each.shape[0] * each.shape[1] for each in layers)
        grid[row][column] = sum(each.bits for each in layers) / elements
        rank = round(sum(each.choice.rank for each in layers) / len(layers))
        text = f"{grid[row][column]:.1f}" + (f"\nr{rank}" if rank else "")
        if len(blocks) <= 24:
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white", bbox=_LABEL)
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(len(blocks)), blocks) if len(blocks) <= 24 else None
    axes.set(xlabel="block", title="Bits per weight, and mean rank (r)")
    figure.colorbar(image, ax=axes, shrink=0.85)


def _draw_layers(axes: Any, plan: Plan) -> None:  # noqa: ANN401
    for at, kind in enumerate(dict.fromkeys(_kind(name) for name in plan.layers)):
        members = [layer for name, layer in plan.layers.items() if _kind(name) == kind]
        bits = [each.bits / (each.shape[0] * each.shape[1]) for each in members]
        values = [each.nats if each.nats is not None else each.error**2 for each in members]
        axes.scatter(
            bits, [max(v, 1e-12) for v in values], s=28, alpha=0.8, label=kind, marker=_MARKERS[at % len(_MARKERS)]
        )
    axes.set(yscale="log", xlabel="stored bits per weight of the layer", ylabel="predicted error of the layer",
             title="Every layer: error against bits")  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, which="both")


def _measured(plan: Plan) -> dict[str, list[tuple[int, float, float]]]:
    """By kind: block, predicted nats and measured KL of the layers that have both."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for name, layer in plan.layers.items():
        if layer.nats and layer.measured and layer.nats > 0 and layer.measured > 0:
            found.setdefault(_kind(name), []).append((_block(name), layer.nats, layer.measured))
    return found


def _draw_measured(axes: Any, plan: Plan) -> None:  # noqa: ANN401
    kinds = _measured(plan)
    for at, (kind, points) in enumerate(kinds.items()):
        predicted, measured = [p[1] for p in points], [p[2] for p in points]
        axes.scatter(predicted, measured, s=28, alpha=0.8, label=kind, marker=_MARKERS[at % len(_MARKERS)])
    every = [value for points in kinds.values() for _, *values in points for value in values]
    ends = [min(every, default=1e-6), max(every, default=1.0)]
    axes.plot(ends, ends, color="gray", linewidth=1)
    axes.plot(ends, [plan.scale * end for end in ends], color="gray", linewidth=1, linestyle="--", label="scale of all")
    axes.set(xscale="log", yscale="log", xlabel="predicted nats", ylabel="measured KL, compressed alone",
             title="Every layer: measured against predicted")  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, which="both")


def _draw_ratios(axes: Any, plan: Plan) -> None:  # noqa: ANN401
    for at, (kind, points) in enumerate(_measured(plan).items()):
        blocks, ratios = [p[0] for p in points], [p[2] / p[1] for p in points]
        axes.plot(blocks, ratios, _MARKERS[at % len(_MARKERS)], markersize=5, alpha=0.8, label=kind)
    axes.axhline(1.0, color="gray", linewidth=1)
    axes.axhline(plan.scale, color="gray", linewidth=1, linestyle="--", label="scale of all")
    axes.set(xlabel="block", ylabel="measured over predicted", title="Where the prediction is off")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
