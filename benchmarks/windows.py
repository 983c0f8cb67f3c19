"""Windows of a text to score, spread evenly over it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def spread(windows: Iterable[Tensor], count: int | None) -> list[Tensor]:
    """``count`` of the windows at equal distances; all where there are no more, or for ``None``."""
    whole = list(windows)
    if count is None or count >= len(whole):
        return whole
    return [whole[i * len(whole) // count] for i in range(count)]
