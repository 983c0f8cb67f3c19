"""Tuned tiles as data: ``tuned/*.json`` hold, for a GPU and a date, the best tiles of measured shapes.

A row serves the shapes it was measured at; another shape takes the row of its kernel that is nearest in the
logarithms of rows, columns, rank, bits and tokens. Which tile runs changes the time, never the answer.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

Row = dict[str, Any]
_FIXED = 0.25  # share of a time that does not grow with the weight: launch, latency, the wait for t
SIZES = ("rows", "columns", "rank", "bits", "tokens")


def tuned(kernel: str, device: torch.device, **sizes: int) -> dict[str, int]:
    """Tile of the nearest measured shape; ``sizes`` are those of `SIZES` that the kernel has."""
    return dict(_nearest(kernel, _file(device), tuple(sorted(sizes.items())))["tile"])


def predicted(kernel: str, device: torch.device, **sizes: int) -> float:
    """Microseconds expected of a kernel: those of the nearest measured shape, times the ratio of the weights' sizes.

    Exact where measured; between shapes mostly within a third (`tests/kernels/test_tuned.py`); 0 where nothing was
    timed.
    """
    row = _nearest(kernel, _file(device), tuple(sorted(sizes.items())))
    size = sizes["rows"] * sizes["columns"] / float(row.get("rows", 1) * row.get("columns", 1))
    if row.get("bits"):
        size *= sizes["bits"] / float(row["bits"])
    measured: float = row.get("microseconds", 0.0)
    return measured * (_FIXED + (1 - _FIXED) * size)


@lru_cache(maxsize=4096)
def _nearest(kernel: str, name: str, sizes: tuple[tuple[str, int], ...]) -> Row:
    rows = [row for row in table(name)["rows"] if row["kernel"] == kernel]
    assert rows, f"no tuned row for {kernel} in {name}.json"

    def distance(row: Row) -> float:
        return sum(_weight(key) * abs(math.log2(1 + size) - math.log2(1 + row.get(key, 0))) for key, size in sizes)

    best: Row = min(rows, key=distance)
    return best


def _weight(key: str) -> float:
    return 4.0 if key in ("bits", "tokens") else 1.0


@lru_cache(maxsize=8)
def table(name: str) -> dict[str, Any]:
    """A tuned table: ``gpu``, ``date``, and ``rows`` of kernel, sizes, tile and microseconds."""
    loaded: dict[str, Any] = json.loads(files("tnc.kernels").joinpath(f"tuned/{name}.json").read_text(encoding="utf-8"))
    return loaded


@lru_cache(maxsize=64)
def _file(device: torch.device) -> str:
    """Name of the table for a device: that of the H200 for every GPU; the interpreter has its own."""
    if device.type != "cuda":
        return "interpreter"
    return "h200"
