"""``tnc bench --tune``: the fastest tiles of the fused kernels on this GPU, found once and kept."""

from __future__ import annotations

import torch

from tnc.cli import console
from tnc.cli.sources import resolve_device
from tnc.errors import ShapeError
from tnc.kernels.tuning import SHAPES, Tried, cuda_clock, problems, save, tune


def run_tune(*, shapes: list[str], seconds: float, device: str, as_json: bool) -> None:
    """Time, write and print."""
    place = resolve_device(device)
    found = problems(place, [_shape(text) for text in shapes] or SHAPES)
    with torch.cuda.device(place), console.progress_bars() as progress:  # where the clock captures graphs
        tried = tune(found, place, cuda_clock, seconds=seconds, progress=progress)
    path, name = save(tried, place), torch.cuda.get_device_name(place)
    if as_json:
        console.print_json({"table": str(path), "device": name, "rows": [each.row for each in tried]})
        return
    columns = ("kernel", "shape", "rank", "bits", "tokens", "µs", "tiles timed", "wrong", "tile")
    console.print_table(f"{name}: {path}", columns, [_row(each) for each in tried])


def _shape(text: str) -> tuple[int, int]:
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ShapeError(f"shape {text!r} is no weight; expected OUTxIN, such as 4096x11008.")
    return int(sides[0]), int(sides[1])


def _row(each: Tried) -> tuple[str, ...]:
    row = each.row
    sizes = (str(row.get(name, "")) for name in ("rank", "bits", "tokens"))
    tile = " ".join(f"{name}={value}" for name, value in row["tile"].items())
    shape = f"{row['rows']}×{row['columns']}"
    return (
        row["kernel"],
        shape,
        *sizes,
        f"{row['microseconds']:.4g}",
        f"{each.timed}/{each.of}",
        str(each.wrong),
        tile,
    )
