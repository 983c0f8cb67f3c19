"""The static page of a plan: one HTML file and one PNG in a folder, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from tnc.cli.plan_picture import draw_plan
from tnc.errors import BudgetError
from tnc.planning import CurveTable, LayerPlan, Plan

_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse;font-size:13px;width:100%}"
    "td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,td:nth-child(2),td:last-child,th:first-child,th:nth-child(2),th:last-child{text-align:left}"
    "dl{display:grid;grid-template-columns:max-content auto;gap:2px 1.5em}dt{color:#666}dd{margin:0}"
)


def write_page(folder: Path, table: CurveTable, front: Sequence[Mapping[str, float]], plan: Plan | None) -> None:
    """Write ``index.html`` and ``plan.png``; the folder is made where it does not exist.

    Raises:
        BudgetError: if the folder cannot be written.
        TNCError: if matplotlib is not installed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw_plan(folder / "plan.png", table, front, plan)
        (folder / "index.html").write_text(_page(table, plan), encoding="utf-8")
    except OSError as error:
        raise BudgetError(f"the report cannot be written to {folder}: {error}.") from error


def _page(table: CurveTable, plan: Plan | None) -> str:
    title = "Error curves" if plan is None else plan.describe()
    facts = {"layers": str(len(table.layers)), "options": f"{sum(len(c.options) for c in table.layers.values()):,}"}
    body = "" if plan is None else _layers(plan)
    if plan is not None:
        facts |= _facts(plan)
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><dl>{rows}</dl>"
        f'<p><img src="plan.png" alt="front, curves over rank, bits over depth, error against bits"></p>{body}'
        "</body></html>\n"
    )


def _facts(plan: Plan) -> dict[str, str]:
    facts = {
        "bits per weight": f"{plan.bits_per_weight:.4f}", "bytes of the checkpoint's tensors": f"{plan.bytes:,}",
        f"minimised ({plan.objective})": f"{plan.value:.6g}, no choice is below {plan.lower_bound:.6g}",
    }  # fmt: skip
    if plan.predicted_nats is not None:
        facts["predicted KL, nats a token"] = f"{plan.predicted_nats:.5g} (scale {plan.scale:.3g})"
    if plan.measured is not None:
        facts["measured KL, nats a token"] = f"{plan.measured['kl']:.5g} ± {plan.measured['kl_error'] or 0:.2g}"
        facts["measured increase of the loss"] = f"{plan.measured['delta_nats']:+.5g} nats"
        facts["perplexity"] = f"{plan.measured['perplexity']:.4f}"
        for what in ("layers", "blocks"):
            if f"{what}_alone" in plan.measured:
                facts[f"sum of the {what} measured alone"] = f"{plan.measured[f'{what}_alone']:.5g} nats a token"
    return {**facts, **{f"note {at + 1}": note for at, note in enumerate(plan.notes)}}


def _layers(plan: Plan) -> str:
    alone = plan.measured_alone
    head = ("layer", "becomes", "bits/weight", "nats", *(("measured alone", "over nats") if alone else ()),
            "held-out error", "share", "ms", "runner-up, and what it costs")  # fmt: skip
    rows = []
    for name, layer in plan.layers.items():
        cells = (
            name, layer.choice.describe(), f"{layer.bits / (layer.shape[0] * layer.shape[1]):.3f}",
            _figure(layer.nats, "{:.3g}"), *(_measured(layer) if alone else ()), f"{layer.error:.4f}",
            f"{layer.share:.1%}", "-" if layer.seconds is None else f"{1000 * layer.seconds:.3g}", layer.why,
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    titles = "".join(f"<th>{escape(each)}</th>" for each in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _measured(layer: LayerPlan) -> tuple[str, str]:
    """KL of the layer alone, and over its prediction."""
    ratio = layer.measured / layer.nats if layer.measured is not None and layer.nats else None
    return _figure(layer.measured, "{:.3g}"), _figure(ratio, "{:.2f}")


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
