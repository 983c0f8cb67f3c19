"""``tnc draw``: the tensor-network diagram of one layer, from a checkpoint or decomposed on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tnc.cli import console
from tnc.cli.sources import open_model, resolve_device
from tnc.decompose import BitsPerWeight, Size, decompose, recipe
from tnc.drawing import Diagram, draw
from tnc.errors import ModelError
from tnc.models.layers import select_layers, weight_of
from tnc.modules import FactoredLinear
from tnc.stats_file import load_stats
from tnc.terms import Expression


@dataclass(frozen=True)
class DrawOptions:
    """What the user asked for; see ``tnc draw --help``."""

    model: str
    layer: str
    out: Path
    recipe: str | None
    bits: int | None
    group_size: int | None
    rank: int | None
    bpw: float | None
    stats: Path | None


def run_draw(options: DrawOptions, *, as_json: bool) -> None:
    """Draw and say where."""
    model, _ = open_model(options.model, device=resolve_device("cpu"))
    name, operator = _factored(model, options.layer) or _decomposed(model, options)
    found = draw(operator, options.out, title=name)
    if as_json:
        console.print_json({"out": str(options.out), "layer": name, **as_data(found)})
    else:
        console.say(f"{options.out}: {name}, {found.bits_per_weight:.3f} bits per weight")


def as_data(found: Diagram) -> dict[str, Any]:
    """JSON-able: panels with their nodes and bonds, and the decay of every bond."""
    panels = [
        {"kind": panel.kind, "shape": list(panel.shape),
         "nodes": [{"name": n.name, "kind": n.kind, "shape": list(n.shape)} for n in panel.nodes],
         "bonds": [{"size": b.size, "nodes": list(b.nodes), "parts": b.parts,
                    "values": None if b.values is None else b.values.tolist()} for b in panel.bonds]}
        for panel in found.panels
    ]  # fmt: skip
    return {"shape": list(found.shape), "bits_per_weight": found.bits_per_weight, "panels": panels}


def _factored(model: nn.Module, layer: str) -> tuple[str, Expression] | None:
    """The operator of a layer that is factored already."""
    for name, module in model.named_modules():
        if name == layer and isinstance(module, FactoredLinear):
            return name, module.operator
    return None


def _decomposed(model: nn.Module, options: DrawOptions) -> tuple[str, Expression]:
    if options.recipe is None:
        raise ModelError(
            f"layer {options.layer!r} of {options.model} is not factored; name a layer of a tnc checkpoint in full, or "
            "give --recipe and its options for a dense model."
        )
    found = select_layers(model, include=[options.layer])
    if len(found) > 1:
        raise ModelError(
            f"--layer {options.layer!r} matches {len(found)} layers; pick one: {', '.join(list(found)[:4])}."
        )
    (name, layer) = next(iter(found.items()))
    size: Size | None = options.rank if options.bpw is None else BitsPerWeight(options.bpw)
    built = recipe(options.recipe, bits=options.bits, group_size=options.group_size, rank=size)
    stats = None if options.stats is None else load_stats(options.stats)[name]
    return name, decompose(weight_of(layer).detach().float(), built.stages, stats, sweeps=built.sweeps).operator
