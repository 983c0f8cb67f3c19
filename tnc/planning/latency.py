"""Measured times of compressed layers: a table a device, interpolated over rank and tokens.

The table is measured on the shapes of a model with the kernels of this library (``tnc bench --table``); nothing is
extrapolated to another device, and to a shape it does not have only with an error that says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tnc.errors import BudgetError
from tnc.planning.portfolio import DENSE, Choice

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Timing:
    """Median time of one call of one layer.

    Attributes:
        shape: (out_features, in_features).
        base: name in the portfolio it was measured with.
        factors: name of the factor format.
        rank: of the low-rank term.
        tokens: rows of the input.
        seconds: median of one call.
        kernel: that served it.
    """

    shape: tuple[int, int]
    base: str
    factors: str
    rank: int
    tokens: int
    seconds: float
    kernel: str = ""


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Timings of one device.

    Attributes:
        device: in words.
        timings: measured points.
    """

    device: str
    timings: Sequence[Timing]

    def seconds(self, shape: tuple[int, int], choice: Choice, tokens: int) -> float:
        """Time of one call: linear in the rank and in the tokens between measured points, flat outside them.

        Raises:
            BudgetError: if the table has no timing of this shape with this base; says how to measure one.
        """
        rows = [t for t in self.timings if tuple(t.shape) == tuple(shape) and t.base == choice.base
                and (t.factors == choice.factors or choice.rank == 0)]  # fmt: skip
        if not rows:
            raise BudgetError(
                f"the latency table of {self.device} has no timing of {choice.base} @ {choice.factors} at shape "
                f"{tuple(shape)}; measure it with: tnc bench MODEL --table FILE."
            )
        counts = sorted({row.tokens for row in rows})
        by_tokens = [_at_rank([row for row in rows if row.tokens == count], choice.rank) for count in counts]
        return float(np.interp(tokens, counts, by_tokens))

    def dense_seconds(self, shape: tuple[int, int], tokens: int) -> float:
        """Time of the dense layer."""
        return self.seconds(shape, Choice(DENSE), tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        fields = {"format_version": FORMAT_VERSION, "device": self.device, "timings": [asdict(t) for t in self.timings]}
        Path(path).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table of `save`.

        Raises:
            BudgetError: if the file is missing or no latency table.
        """
        try:
            fields: Mapping[str, object] = json.loads(Path(path).read_text(encoding="utf-8"))
            rows: list[dict[str, object]] = fields["timings"]  # type: ignore[assignment]
            timings = [Timing(**{**row, "shape": tuple(row["shape"])}) for row in rows]  # type: ignore[arg-type]
            return cls(str(fields["device"]), timings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BudgetError(f"{path} is no latency table ({error}); measure one with tnc bench --table.") from error


def _at_rank(rows: Sequence[Timing], rank: int) -> float:
    ranks = sorted({row.rank for row in rows})
    times = [float(np.median([row.seconds for row in rows if row.rank == each])) for each in ranks]
    return float(np.interp(rank, ranks, times))
