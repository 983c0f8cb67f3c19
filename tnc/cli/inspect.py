"""``tnc inspect``: what a checkpoint folder holds, without loading its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tnc.checkpoint import read_manifest
from tnc.cli import console
from tnc.formats import format_from_spec


def run_inspect(folder: Path, *, as_json: bool) -> None:
    """Print the manifest: recipe, totals and a row a layer."""
    manifest = read_manifest(folder)
    if as_json:
        console.print_json({key: value for key, value in manifest.items() if key != "tensors"})
        return
    console.say(f"{folder}: {manifest.get('recipe') or 'no recipe'} of {manifest.get('base') or 'an unnamed model'}")
    rows = [_row(name, layer) for name, layer in manifest["layers"].items()]
    columns = ("layer", "shape", "form", "bits/weight", "error", "held-out", "lower bound", "nats")
    console.print_table("Layers", columns, rows)


def _row(name: str, layer: dict[str, Any]) -> tuple[str, ...]:
    report = layer.get("report") or {}
    return (
        name,
        "×".join(map(str, layer["shape"])),
        outline(layer["spec"]),
        console.fixed(report.get("bits_per_weight"), 3),
        console.fixed(report.get("relative_error"), 4),
        console.fixed(report.get("heldout_relative_error"), 4),
        console.fixed(report.get("lower_bound"), 4),
        console.number(report.get("predicted_nats"), 3),
    )


def outline(spec: dict[str, Any]) -> str:
    """One line for an expression: ``int3 g64 + rank 16``."""
    if spec["kind"] == "sum":
        return " + ".join(outline(term) for term in spec["terms"])
    if spec["kind"] == "product":
        return " · ".join(outline(term) for term in spec["terms"])
    if spec["kind"] == "low_rank":
        return f"rank {spec['rank']}"
    if spec["kind"] == "quantized":
        return format_from_spec(spec["format"]).describe()
    return str(spec["kind"])
