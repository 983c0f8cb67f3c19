"""How large a low-rank term should be, as value types: `Rank`, `RelativeError`, `BitsPerWeight`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tnc.errors import BudgetError, check_rank


@dataclass(frozen=True)
class Rank:
    """Exactly ``value`` columns; checked against ``min(weight.shape)`` where it is used."""

    value: int


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


def rank_within_bits(size: BitsPerWeight, shape: tuple[int, int], spent_bits: int, dtype: torch.dtype) -> int:
    """Largest rank with factors in ``dtype`` that fits beside ``spent_bits`` already stored.

    Raises:
        BudgetError: if the other terms alone exceed the budget.
    """
    rows, columns = shape
    budget = size.value * rows * columns
    if spent_bits / (rows * columns) > size.value:
        raise BudgetError(
            f"BitsPerWeight({size.value}) allows {budget:.0f} bits for weight {shape}, but the other terms already "
            f"store {spent_bits}; ask for at least {spent_bits / (rows * columns):.4f} bits or a smaller base format."
        )
    per_rank = (rows + columns) * dtype.itemsize * 8
    rank = int((budget - spent_bits) // per_rank) + 1
    while (spent_bits + rank * per_rank) / (rows * columns) > size.value:  # as reports divide: products round
        rank -= 1
    return min(rank, rows, columns)
