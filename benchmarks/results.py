"""Files of results, JSON: written whole or not at all, so that a run that is cut short keeps what it had; and cells."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """What a file holds; no rows where there is no file."""
    return dict(json.loads(path.read_text())) if path.exists() else {"rows": []}


def write(path: Path, found: Any, *, default: Callable[[Any], Any] | None = None) -> None:  # noqa: ANN401
    """Put a file in the place of an older one; ``default`` is that of `json.dumps`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1, default=default) + "\n")
    partial.replace(path)


def mean_and_spread(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    """The mean, ± the standard deviation where there are several values."""
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{more}"
