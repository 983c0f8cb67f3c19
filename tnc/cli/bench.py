"""``tnc bench --table``: times of the layers of a model in every form that a planner may choose."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tnc.cli import console
from tnc.cli.sources import open_model, resolve_device
from tnc.decompose import decompose
from tnc.errors import FormatError
from tnc.models.layers import select_layers, weight_of
from tnc.modules import FactoredLinear
from tnc.planning import Choice, LatencyTable, Portfolio, Timing
from tnc.terms import map_tensors


def run_bench(
    name: str, path: Path, *, tokens: list[int], ranks: list[int], group_size: int, repeats: int, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure, write and print."""
    place = resolve_device(device)
    model, _ = open_model(name, device=torch.device("cpu"))
    weights = {tuple(weight_of(layer).shape): weight_of(layer).detach() for layer in select_layers(model).values()}
    portfolio = Portfolio.default(group_sizes=(group_size, None), method="rtn")  # times do not depend on the method
    timings: list[Timing] = []
    with console.progress_bars() as progress:
        for done, weight in enumerate(weights.values()):
            for choice in _choices(portfolio, ranks, min(weight.shape)):
                timings += list(_timed(weight, portfolio, choice, tokens, repeats, place))
            progress("shapes", done + 1, len(weights))
    words = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    table = LatencyTable(words, timings)
    table.save(path)
    if as_json:
        console.print_json({"table": str(path), "device": words, "points": len(timings)})
        return
    rows = [_row(timing) for timing in timings]
    console.print_table(f"{words}: {path}", ("shape", "base", "factors", "rank", "tokens", "ms", "kernel"), rows)


def _row(timing: Timing) -> tuple[str, ...]:
    shape = "×".join(map(str, timing.shape))
    sizes = timing.base, timing.factors, str(timing.rank), str(timing.tokens)
    return (shape, *sizes, f"{1e3 * timing.seconds:.4g}", timing.kernel)


def _choices(portfolio: Portfolio, ranks: list[int], limit: int) -> Iterator[Choice]:
    for base, entry in portfolio.bases.items():
        for factors in portfolio.factors:
            for rank in ranks if entry.compensated else [0]:
                alone = rank == 0 and (factors != "16" or entry.stage is None)  # measured once, or nothing at all
                if rank <= limit and not alone:
                    yield Choice(base, rank, factors)


def _timed(
    weight: Tensor, portfolio: Portfolio, choice: Choice, tokens: list[int], repeats: int, device: torch.device
) -> Iterator[Timing]:
    try:
        operator = decompose(weight, portfolio.stages(choice)).operator
    except FormatError:  # a group size that does not divide the width: not in the portfolio of this layer
        return
    module = FactoredLinear(map_tensors(operator, lambda t: t.to(device))).to(device)
    for count in tokens:
        x = torch.randn(count, weight.shape[1], dtype=weight.dtype, device=device)
        shape = (weight.shape[0], weight.shape[1])
        yield Timing(shape, choice.base, choice.factors, choice.rank, count, _median(module, x, repeats), module.kernel)


def _median(module: FactoredLinear, x: Tensor, repeats: int) -> float:
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            _wait(x)
            start = time.perf_counter()
            module(x)
            _wait(x)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
