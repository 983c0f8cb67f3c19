"""Tiles for this GPU: every kernel's tiles tried on problems of common shapes, for a bounded time, the fastest kept.

The tiles tried are those that the shipped table (`tnc.kernels.tuned`) holds for the kernel anywhere, those of the
nearest shapes first. Every answer is compared with that of the first tile before its clock starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnc.errors import BackendError
from tnc.kernels import tuned
from tnc.kernels.tuned import Row

SHAPES = ((4096, 4096),)
"""(out_features, in_features) that are tuned unless others are named."""
_MOST = 2e-2  # relative difference of two tiles' answers in bfloat16

Call = Callable[[], Tensor]
Clock = Callable[[Call], float]


@dataclass(frozen=True)
class Problem:
    """One kernel at one shape.

    Attributes:
        kernel: its name in the tables.
        sizes: those of `tnc.kernels.tuned.SIZES` that it has.
        build: makes the tensors and returns the launch.
    """

    kernel: str
    sizes: dict[str, int]
    build: Callable[[], Call]


@dataclass(frozen=True)
class Tried:
    """What came of a problem: the row of the table, and how many of its tiles were timed and how many were wrong."""

    row: Row
    timed: int
    of: int
    wrong: int


Build = Callable[[torch.device, int, int], Iterable[Problem]]
_BUILDERS: list[Build] = []


def register_problems(build: Build) -> None:
    """Add problems to tune: ``build(device, out_features, in_features)``."""
    _BUILDERS.append(build)


def problems(device: torch.device, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Problem]:
    """Every tiled kernel at every shape (out_features, in_features).

    Raises:
        BackendError: for a device without CUDA, or without Triton.
    """
    if device.type != "cuda":
        raise BackendError(
            f"tnc bench --tune got device {device.type}; only tiles of the fused kernels are tuned, which run on CUDA "
            "GPUs. Run it on a machine with a GPU; CPU kernels need no tuning."
        )
    if not _BUILDERS:
        raise BackendError("tnc bench --tune needs Triton for the fused kernels; pip install tnc[triton].")
    return [problem for rows, columns in shapes for build in _BUILDERS for problem in build(device, rows, columns)]


def tune(
    problems: Sequence[Problem], device: torch.device, clock: Clock, *, seconds: float,
    now: Callable[[], float] = time.monotonic, progress: Callable[[str, int, int], None] | None = None,
) -> list[Tried]:  # fmt: skip
    """The fastest tile of every problem, in about so many seconds for all together.

    Each problem may use its share of the time that is left. Its first tile, the one that would run now, is always
    timed, so a longer time can only bring better tiles.

    Args:
        problems: from `problems`.
        device: where they run.
        clock: microseconds of a launch.
        seconds: above 0.
        now: the time, in seconds.
        progress: called with (stage, done, total).
    """
    started, found = now(), []
    for done, problem in enumerate(problems):
        left = seconds - (now() - started)
        found.append(_tried(problem, device, clock, now() + max(left, 0.0) / (len(problems) - done), now))
        if progress is not None:
            progress("kernels", done + 1, len(problems))
    return found


def save(tried: Sequence[Tried], device: torch.device) -> Path:
    """Write the table of a GPU to the cache folder, where `tnc.kernels.tuned` finds it from now on."""
    table: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device), "date": date.today().isoformat(), "torch": torch.__version__,
        "triton": version("triton"), "rows": [each.row for each in tried],
    }  # fmt: skip
    path = tuned.own_table(device)
    assert path is not None, "other devices have no problems"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    tuned.forget()
    return path


def cuda_clock(call: Call) -> float:
    """Median microseconds of a captured launch, the GPU's cache flushed before each of ten replays.

    What the replay of a graph takes by itself is taken off, so that times compare with those of the shipped table.
    """
    return _replay((call,)) - _overhead()


@lru_cache(maxsize=1)
def _overhead() -> float:
    """Microseconds of a replay beside its kernels: those of one small kernel, less what a second one adds."""
    small = torch.zeros(1, device="cuda")
    one, two = _replay((small.zero_,)), _replay((small.zero_, small.zero_))
    return 2 * one - two


def _replay(calls: Sequence[Call]) -> float:
    """Median microseconds of ten replays of the captured calls."""
    flush = torch.empty(128 << 20, dtype=torch.int8, device="cuda")
    event: Callable[[], Any] = partial(torch.cuda.Event, enable_timing=True)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(10):
        flush.zero_()
        begin, end = event(), event()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * float(begin.elapsed_time(end)))
    return sorted(times)[len(times) // 2]


def _tried(problem: Problem, device: torch.device, clock: Clock, until: float, now: Callable[[], float]) -> Tried:
    tiles = tuned.tiles(problem.kernel, device, **problem.sizes)
    call, reference = problem.build(), None
    best, timed, wrong = (float("inf"), tiles[0]), 0, 0
    for tile in tiles:
        if timed and now() >= until:
            break
        with tuned.trying(problem.kernel, tile):
            answer = call().float()
            reference = answer if reference is None else reference
            if not float((answer - reference).norm()) <= _MOST * float(reference.norm()):
                wrong += 1
                continue
            best, timed = min(best, (clock(call), tile), key=lambda pair: pair[0]), timed + 1
    row = {"kernel": problem.kernel, **problem.sizes, "tile": best[1], "microseconds": round(best[0], 2)}
    return Tried(row, timed, len(tiles), wrong)
