"""The clock of the GPU benchmarks: one CUDA graph, replayed, timed by events; and what they say about the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import triton

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


def cold_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of several calls in one graph, L2 flushed before each of 15 replays."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    time, _ = replayed(lambda: [call() for call in calls], repeats=15, before=flush.zero_)
    return time * 1e3 / len(calls)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Memory that nothing wrote is NaN within it, so that it cannot pass for an answer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gpu() -> dict[str, str]:
    """Name and versions for the head of a table."""
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
