"""The clock of the GPU benchmarks: one CUDA graph, replayed, timed by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def replayed(call: Callable[[], T], *, repeats: int, before: Callable[[], object] | None = None) -> tuple[float, T]:
    """Median milliseconds of a replay of ``call``, and what it returned: tensors that the last replay wrote.

    Args:
        call: launches only; runs once before it is captured.
        repeats: replays.
        before: run ahead of each replay, outside of the time, such as to flush a cache.
    """
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    times = []
    for _ in range(repeats):
        if before is not None:
            before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), result
