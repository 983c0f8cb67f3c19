"""What bonds of a matrix product operator buy: predicted nats against stored bits, measured at a few sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Bonds = tuple[int, ...]

_LEAST = 1e-6  # of the nats of the zero matrix: where the logarithm of a curve ends


@dataclass(frozen=True)
class BondPoint:
    """One choice of the d - 1 inner bonds of a layer.

    Attributes:
        bonds: bond dimensions; all 0 is the zero matrix.
        bits: that the cores store.
        nats: predicted increase of the loss.
    """

    bonds: Bonds
    bits: int
    nats: float


def bond_curve(
    choices: Sequence[tuple[Bonds, int]], nothing: BondPoint, measure: Callable[[Bonds], float], count: int
) -> tuple[BondPoint, ...]:
    """The zero matrix and all choices, ``count`` of them measured and the others between them.

    No closed form holds in a full metric, and what refinement brings differs from layer to layer: on stories260K curves
    of the Kronecker-factored metric gave 3 cores worse bonds than one limit for all layers, five refined fits
    a layer better ones (docs/tensor-networks.md).

    Args:
        choices: bonds and their bits, rising.
        nothing: the zero matrix.
        measure: nats of a choice.
        count: measured choices, at least 2: the first, the last, and geometrically between; the nats of others
            are interpolated, logarithm against logarithm of the bits. More bits are never taken to be worse.
    """
    if not choices:
        return (nothing,)
    known: dict[int, float] = {}
    least, before = _LEAST * nothing.nats, nothing.nats
    for at in _spaced(len(choices), count):
        known[at] = before = min(before, measure(choices[at][0]))
    nats = dict(known)
    for low, high in pairwise(known):
        for at in range(low + 1, high):
            nats[at] = _between(choices, known, (low, at, high), least)
    return (nothing, *(BondPoint(bonds, bits, nats[at]) for at, (bonds, bits) in enumerate(choices)))


def _spaced(size: int, count: int) -> list[int]:
    """Positions 0 and ``size - 1``, and geometrically between them."""
    shares = [k / max(count - 1, 1) for k in range(count)]
    return sorted({round(size**share) - 1 for share in shares})


def _between(
    choices: Sequence[tuple[Bonds, int]], known: dict[int, float], at: tuple[int, int, int], least: float
) -> float:
    low, middle, high = (math.log(choices[k][1]) for k in at)
    first, last = (math.log(max(known[k], least, 1e-300)) for k in (at[0], at[2]))
    share = (middle - low) / (high - low) if high > low else 1.0
    return min(math.exp(first + share * (last - first)), known[at[0]])
