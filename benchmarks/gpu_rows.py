"""Rows of the GPU benchmarks: a way of one shape, checked and timed; random weights; files that grow row by row.

A row is captured ``R`` times over ``R`` weight sets of together 300 MB, so weights come from memory and x from L2; the
time is the median of 15 replays, L2 flushed before each, over R. Gaps between launches are included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_clock import cold_microseconds, nan_filled
from benchmarks.results import write
from tnc.kernels import Repacking, choose
from tnc.terms import Expression

BRAIN = torch.bfloat16
TOTAL = 300e6  # bytes of all weight sets
SHAPES = ((4096, 4096), (14336, 4096))  # (out_features, in_features)


@dataclass
class Row:
    """One timed way of one shape: ``launch(set)`` runs it, ``exact`` is the float64 answer of set 0."""

    kernel: str
    shape: str
    tokens: int
    sets: Sequence[Any]
    launch: Callable[..., Tensor | list[Tensor]]
    exact: Tensor


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """bfloat16 normal numbers."""
    return (torch.randn(*shape, device="cuda") * scale).to(BRAIN)


def again(each: Any, *names: str) -> Any:  # noqa: ANN401
    """The same numbers with these tensors elsewhere in memory."""
    return replace(each, **{name: getattr(each, name).clone() for name in names})


def count(size: float, tokens: int) -> int:
    """Weight sets that make `TOTAL` bytes."""
    return max(3, min(64 if tokens <= 16 else 16, int(TOTAL / size)))


def error(row: Row) -> float:
    """Relative error of set 0, with NaN in memory that nothing wrote; several outputs lie one after another."""
    with nan_filled():
        y = row.launch(row.sets[0])
    flat = torch.cat([part.flatten() for part in (y if isinstance(y, list) else [y])]).double()
    exact = row.exact.flatten()
    return float((flat - exact).norm() / exact.norm())


def reported(rows: Iterable[Row], width: int = 34) -> Iterator[dict[str, Any]]:
    """Each row checked, timed if it is right, and printed, its name ``width`` wide."""
    for row in rows:
        wrong = error(row)
        time = cold_microseconds([partial(row.launch, each) for each in row.sets]) if wrong < 1e-2 else None
        shown = "no time: wrong" if time is None else f"{time:9.2f} us"
        print(f"{row.kernel:<{width}}{row.shape:<14}{row.tokens:>5} {shown}  error {wrong:.1e}", flush=True)
        yield {"kernel": row.kernel, "shape": row.shape, "tokens": row.tokens, "error": wrong, "us": time}


def keep(path: Path, machine: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows of a run, the file anew after each, so that a run that is cut short keeps what it had."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        write(path, {"machine": machine, "rows": found})


def bound_to(operator: Expression, backend: str) -> Callable[[Tensor], Tensor]:
    """An operator by a kernel of the table, with the tensors as that holds them."""
    kernel, _ = choose(operator, torch.device("cuda", 0), BRAIN, backend=backend)
    tensors = kernel.pack(operator.tensors()) if isinstance(kernel, Repacking) else operator.tensors()
    return lambda x: kernel(x, tensors)
