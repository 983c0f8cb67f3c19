"""One way for every form to turn a size into a rank: exactly, within bits, or by the error as stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tnc.decompose.sizes import BitsPerWeight, Rank, RelativeError, Size
from tnc.errors import BudgetError, RankError
from tnc.metric import Metric
from tnc.terms import Expression, dense64


@dataclass(frozen=True)
class RankFamily:
    """A form of one weight at every rank.

    Attributes:
        name: of the decomposer, for errors.
        fit: rank -> the term as stored.
        bits: rank -> bits that the term will store; increases with the rank.
        limit: largest rank; the form is then exact, or as large as it gets. Rank 0 is the zero matrix.
    """

    name: str
    fit: Callable[[int], Expression]
    bits: Callable[[int], int]
    limit: int


def fit_size(family: RankFamily, size: Size, weight: Tensor, metric: Metric) -> Expression:
    """The term of the rank that ``size`` asks for.

    `RelativeError` is met as stored, by bisection over the rank: the smallest rank wherever the error falls
    with it. `BitsPerWeight` takes the largest rank that fits.

    Raises:
        RankError: for a rank outside ``0..limit``.
        BudgetError: if no rank meets the error.

    Cost: about ``log2(limit)`` fits for `RelativeError`, one otherwise.
    """
    if isinstance(size, RelativeError):
        return _within_error(family, size, weight, metric)
    if isinstance(size, BitsPerWeight):
        return family.fit(_within_bits(family, size, weight.numel()))
    return family.fit(_checked(family, size.value if isinstance(size, Rank) else size, weight))


def _checked(family: RankFamily, rank: int, weight: Tensor) -> int:
    if isinstance(rank, bool) or int(rank) != rank or not 0 <= rank <= family.limit:
        raise RankError(
            f"{family.name}(rank={rank}) is outside 0 <= rank <= {family.limit} for weight "
            f"{tuple(weight.shape)}; use an integer in this range."
        )
    return int(rank)


def _within_bits(family: RankFamily, size: BitsPerWeight, entries: int) -> int:
    return _bisect(0, family.limit, lambda rank: family.bits(rank) / entries > size.value) - 1


def _within_error(family: RankFamily, size: RelativeError, weight: Tensor, metric: Metric) -> Expression:
    largest = size.value * metric.norm(weight.double())
    fitted: dict[int, Expression] = {}

    def meets(rank: int) -> bool:
        fitted[rank] = family.fit(rank)
        return metric.norm(weight.double() - dense64(fitted[rank])) <= largest

    rank = _bisect(0, family.limit, meets)
    if rank > family.limit:
        reached = metric.relative(weight.double() - dense64(fitted[family.limit]), weight.double())
        raise BudgetError(
            f"RelativeError({size.value}) cannot be met by {family.name}: at its largest rank {family.limit} the "
            f"relative error as stored is {reached:.3e}. Ask for more, or store the factors in a wider dtype."
        )
    return fitted[rank]


def _bisect(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Smallest rank in ``low..high`` that holds, ``high + 1`` if ``high`` does not."""
    if not holds(high):
        return high + 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high
