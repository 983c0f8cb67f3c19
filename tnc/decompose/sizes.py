"""How large a low-rank term should be, as value types: `Rank`, `RelativeError`, `BitsPerWeight`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tnc.errors import BudgetError, RankError, check_rank


@dataclass(frozen=True)
class Rank:
    """Exactly ``value`` columns; checked against ``min(weight.shape)`` where it is used.

    Attributes:
        value: of the rank.
        forced: allow ranks above `useful_rank`, whose factors have more entries than the matrix.
    """

    value: int
    forced: bool = False


@dataclass(frozen=True)
class RelativeError:
    """The smallest rank whose error, as stored, is at most ``value * norm(weight)`` (not squared).

    Raises:
        BudgetError: if ``value`` is not in [0, 1).
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise BudgetError(f"RelativeError({self.value}) is outside [0, 1); 1 is the error of storing nothing.")


@dataclass(frozen=True)
class BitsPerWeight:
    """The largest rank that keeps all stored bits of the layer within ``value`` bits per dense weight.

    Raises:
        BudgetError: if ``value`` is not positive.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise BudgetError(f"BitsPerWeight({self.value}) must be positive, for example BitsPerWeight(4.25).")


Size = int | Rank | RelativeError | BitsPerWeight


def fixed_rank(size: int | Rank, shape: tuple[int, int], caller: str) -> int:
    """The rank of a plain size, checked against the shape."""
    return check_rank(size.value if isinstance(size, Rank) else size, shape, caller)


def useful_rank(shape: tuple[int, int]) -> int:
    """``mn / (m + n)``, rounded down: above it two factors have more entries than the matrix itself."""
    return shape[0] * shape[1] // max(sum(shape), 1)


def beyond_use(size: Size, shape: tuple[int, int]) -> int | None:
    """The rank, where it is a plain one above `useful_rank` that nobody forced; else ``None``."""
    if not isinstance(size, int | Rank) or (isinstance(size, Rank) and size.forced):
        return None
    value = size.value if isinstance(size, Rank) else size
    return value if value > useful_rank(shape) else None


def check_useful(size: Size, shape: tuple[int, int], caller: str) -> None:
    """Raise `RankError` for a rank above `useful_rank` that is not forced."""
    rank = beyond_use(size, shape)
    if rank is not None and rank <= min(shape):  # larger ones have an error of their own
        raise RankError(
            f"{caller}(rank={rank}) is above the useful limit mn/(m+n) = {useful_rank(shape)} of a weight {shape}: its "
            f"factors have more entries than the matrix. Use a rank <= {useful_rank(shape)}, or tnc.Rank({rank}, "
            "forced=True)."
        )


def rank_within_bits(
    size: BitsPerWeight, shape: tuple[int, int], spent_bits: int, factor_bits: Callable[[int], int],
    ranks: Sequence[int] | None = None,
) -> int:  # fmt: skip
    """Largest rank whose factors fit beside ``spent_bits`` already stored.

    Args:
        size: the budget.
        shape: (out_features, in_features).
        spent_bits: bits of the other terms.
        factor_bits: rank to the bits of both factors, never falling.
        ranks: that can be stored, ascending from 0; ``None`` is all.

    Raises:
        BudgetError: if the other terms alone exceed the budget.
    """
    rows, columns = shape
    if spent_bits / (rows * columns) > size.value:
        raise BudgetError(
            f"BitsPerWeight({size.value}) allows {size.value * rows * columns:.0f} bits for weight {shape}, but the "
            f"other terms already store {spent_bits}; ask for at least {spent_bits / (rows * columns):.4f} bits or a "
            "smaller base format."
        )
    choices = range(min(shape) + 1) if ranks is None else ranks
    # divided as reports divide: products round
    beyond = bisect_left(choices, True, key=lambda k: (spent_bits + factor_bits(k)) / (rows * columns) > size.value)
    return choices[beyond - 1]


def float_bits(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:
    """Bits of both factors of a weight ``shape`` in a float dtype."""
    return rank * (shape[0] + shape[1]) * dtype.itemsize * 8
