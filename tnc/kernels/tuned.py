"""Tuned tiles as data: ``tuned/*.json`` hold, for a GPU and a date, the best tiles of measured shapes.

A row serves the shapes it was measured at; another shape takes the row of its kernel that is nearest in the
logarithms of rows, columns, rank, bits and tokens. Which tile runs changes the time, never the answer. Rows without
``microseconds`` hold a tile and no time.

``tnc bench --tune`` writes such a table for the GPU at hand into the cache folder; the kernels that it holds are
taken from there, the others from the shipped table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from tnc.compiled import cache_folder

Row = dict[str, Any]
Tile = dict[str, int]
_FIXED = 0.25  # share of a time that does not grow with the weight: launch, latency, the wait for t
SIZES = ("rows", "columns", "rank", "bits", "tokens")


_tried: dict[str, Tile] = {}  # of `trying`


def tuned(kernel: str, device: torch.device, **sizes: int) -> Tile:
    """Tile of the nearest measured shape; ``sizes`` are those of `SIZES` that the kernel has."""
    return dict(_tried.get(kernel) or _nearest(kernel, device, tuple(sorted(sizes.items())))["tile"])


@contextmanager
def trying(kernel: str, tile: Tile) -> Iterator[None]:
    """Within it the kernel runs with this tile."""
    _tried[kernel] = tile
    try:
        yield
    finally:
        del _tried[kernel]


def tiles(kernel: str, device: torch.device, **sizes: int) -> list[Tile]:
    """All tiles that the tables of a device hold for a kernel: the one that runs now, then nearest shapes first."""
    shipped = [row for row in table(_file(device))["rows"] if row["kernel"] == kernel]
    rows = sorted(_rows(kernel, device) + shipped, key=lambda row: _distance(row, tuple(sizes.items())))
    return list({tuple(sorted(row["tile"].items())): row["tile"] for row in rows}.values())


def predicted(kernel: str, device: torch.device, **sizes: int) -> float | None:
    """Microseconds expected of a kernel: those of the nearest timed shape, times the ratio of the weights' sizes.

    Exact where measured; between shapes mostly within a third (`tests/kernels/test_tuned.py`); ``None`` where nothing
    was timed.
    """
    row = _nearest_timed(kernel, device, tuple(sorted(sizes.items())))
    if row is None:
        return None
    size = sizes["rows"] * sizes["columns"] / float(row.get("rows", 1) * row.get("columns", 1))
    if row.get("bits"):
        size *= sizes["bits"] / float(row["bits"])
    measured: float = row["microseconds"]
    return measured * (_FIXED + (1 - _FIXED) * size)


@lru_cache(maxsize=4096)
def _nearest(kernel: str, device: torch.device, sizes: tuple[tuple[str, int], ...]) -> Row:
    return min(_rows(kernel, device), key=lambda row: _distance(row, sizes))


@lru_cache(maxsize=4096)
def _nearest_timed(kernel: str, device: torch.device, sizes: tuple[tuple[str, int], ...]) -> Row | None:
    timed = [row for row in _rows(kernel, device) if "microseconds" in row]
    return min(timed, key=lambda row: _distance(row, sizes), default=None)


def _rows(kernel: str, device: torch.device) -> list[Row]:
    """Rows of a kernel: those measured on this machine where there are any, else the shipped ones."""
    own = own_table(device)
    held = _read(str(own))["rows"] if own is not None and own.exists() else []
    rows = [row for row in held if row["kernel"] == kernel]
    rows = rows or [row for row in table(_file(device))["rows"] if row["kernel"] == kernel]
    assert rows, f"no tuned row for {kernel} in {_file(device)}.json"
    return rows


def _distance(row: Row, sizes: tuple[tuple[str, int], ...]) -> float:
    return sum(_weight(key) * abs(math.log2(1 + size) - math.log2(1 + row.get(key, 0))) for key, size in sizes)


def _weight(key: str) -> float:
    return 4.0 if key in ("bits", "tokens") else 1.0


@lru_cache(maxsize=8)
def table(name: str) -> dict[str, Any]:
    """A tuned table: ``gpu``, ``date``, and ``rows`` of kernel, sizes, tile and microseconds."""
    loaded: dict[str, Any] = json.loads(files("tnc.kernels").joinpath(f"tuned/{name}.json").read_text(encoding="utf-8"))
    return loaded


def own_table(device: torch.device) -> Path | None:
    """Where the table of the GPU at hand is, or would be; ``None`` for other devices."""
    if device.type != "cuda":
        return None
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache_folder() / f"tiles-{name}.json"


def forget() -> None:
    """Read the tables anew from now on."""
    _nearest.cache_clear()
    _nearest_timed.cache_clear()
    _read.cache_clear()


@lru_cache(maxsize=8)
def _read(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return loaded


@lru_cache(maxsize=64)
def _file(device: torch.device) -> str:
    """Name of the table for a device: that of the H200 for every GPU; the interpreter has its own."""
    if device.type != "cuda":
        return "interpreter"
    return "h200"
