"""Where the command line talks: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

_WIDTH = 160  # of tables that do not go to a terminal: files and pipes cut nothing off

_OUT = Console(width=None if sys.stdout.isatty() else _WIDTH)
_ERR = Console(stderr=True)


class Report(Protocol):
    """A progress callback: (stage, done, total)."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Record progress."""


@contextmanager
def progress_bars(prefix: str = "") -> Iterator[Report]:
    """One bar a stage, with the time that remains; gone when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_ERR, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{prefix}{stage}", total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output, without colour or wrapping."""
    _OUT.file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; columns after the first are right-aligned where all their cells are numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        numeric = all(_is_number(row[i]) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _OUT.print(table)


def say(text: str) -> None:
    """A line of result."""
    _OUT.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """A line that is not a result."""
    _ERR.print(text, highlight=False, markup=False, soft_wrap=True)


def error(text: str) -> None:
    """A message to somebody who made a mistake."""
    _ERR.print(text, style="bold red", highlight=False, markup=False, soft_wrap=True)


def number(value: float | None, digits: int = 4) -> str:
    """A float with ``digits`` significant digits, or a dash."""
    return "-" if value is None else f"{value:.{digits}g}"


def fixed(value: float | None, decimals: int) -> str:
    """A float with ``decimals`` decimals, or a dash."""
    return "-" if value is None else f"{value:.{decimals}f}"


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace("-", "0") if cell == "-" else cell)
    except ValueError:
        return False
    return True
