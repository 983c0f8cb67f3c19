"""Modes: how the features of a matrix are split into the legs of a network.

A matrix (m, n) becomes a tensor over ``(o_1, i_1, ..., o_d, i_d)``. Where a size has no balanced factorization
it is padded: the product of the modes may exceed the features, and the network stores the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from operator import index

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnc.errors import ShapeError

Modes = tuple[int, ...]

# Largest mode over smallest one beyond which a size is padded rather than factored as it is.
_MOST_UNEQUAL = 4
_LISTED = 8  # factorizations that an error message shows


def balanced_modes(n: int, d: int) -> Modes:
    """``d`` modes, ascending, of the smallest ``N >= n`` that has modes within a factor 4 of each other.

    ``balanced_modes(4096, 2) == (64, 64)``, ``balanced_modes(11008, 3) == (16, 16, 43)``; for a prime there is
    padding: ``balanced_modes(13, 2) == (2, 7)``, ``N = 14``. Of several factorizations of N the one with the
    smallest largest mode is taken.

    Args:
        n: features, at least 1.
        d: number of modes, at least 1.

    Raises:
        ShapeError: if ``n`` or ``d`` is less than 1.
    """
    n, d = _positive(n, "n", "balanced_modes"), _positive(d, "d", "balanced_modes")
    while True:
        modes = exact_modes(n, d)
        if modes[-1] <= _MOST_UNEQUAL * modes[0]:
            return modes
        n += 1


def exact_modes(n: int, d: int) -> Modes:
    """The factorization of ``n`` into ``d`` modes, ascending, with the smallest largest mode; (1, n) for a prime.

    Raises:
        ShapeError: if ``n`` or ``d`` is less than 1.
    """
    n, d = _positive(n, "n", "exact_modes"), _positive(d, "d", "exact_modes")
    return factorizations(n, d)[0]


@lru_cache(maxsize=4096)
def factorizations(n: int, d: int) -> tuple[Modes, ...]:
    """Every ascending factorization of ``n`` into ``d`` factors, the most balanced first."""
    found = _factors(n, d, 1)
    return tuple(sorted(found, key=lambda modes: (modes[-1], *(-mode for mode in modes))))


def site_modes(shape: tuple[int, int], d: int) -> tuple[Modes, Modes]:
    """Balanced modes of both sides of a matrix, large output modes beside small input modes.

    Sites of equal size ``o_k i_k`` take the fewest numbers per bond dimension: 512 x 512 in two cores stores
    16·32 + 32·16 = 1024 numbers a bond, paired the other way 16·16 + 32·32 = 1280.
    """
    return balanced_modes(shape[0], d), balanced_modes(shape[1], d)[::-1]


def check_modes(modes: Sequence[int], features: int, name: str) -> Modes:
    """``modes`` as a tuple of Python ints, if their product is at least ``features``.

    Raises:
        ShapeError: if a mode is less than 1 or the product too small; lists factorizations that fit.
    """
    given = tuple(_positive(mode, name, "modes") for mode in modes)
    if not given or prod(given) < features:
        fitting = ", ".join(map(str, factorizations(features, max(len(given), 1))[:_LISTED]))
        raise ShapeError(
            f"{name}={given} multiply to {prod(given)}; expected at least {features} features. Factorizations of "
            f"{features} into {max(len(given), 1)}: {fitting}; with padding, balanced_modes gives "
            f"{balanced_modes(features, max(len(given), 1))}."
        )
    return given


def check_pair(shape: tuple[int, int], out_modes: Sequence[int], in_modes: Sequence[int]) -> tuple[Modes, Modes]:
    """Both mode lists checked against a matrix (out_features, in_features) and each other.

    Raises:
        ShapeError: if their lengths differ or one does not cover its features.
    """
    if len(out_modes) != len(in_modes):
        raise ShapeError(
            f"out_modes={tuple(out_modes)} and in_modes={tuple(in_modes)} have {len(out_modes)} and {len(in_modes)} "
            "entries; expected one output and one input mode a core (1 is a valid mode)."
        )
    return check_modes(out_modes, shape[0], "out_modes"), check_modes(in_modes, shape[1], "in_modes")


def site_tensor(weight: Tensor, out_modes: Modes, in_modes: Modes, dtype: torch.dtype) -> Tensor:
    """(..., o_1 i_1, ..., o_d i_d): a copy of (..., m, n) in ``dtype``, padded with zeros, one leg a site."""
    *batch, rows, columns = weight.shape
    extra = prod(in_modes) - columns, prod(out_modes) - rows
    padded = pad(weight, (0, extra[0], 0, extra[1])) if any(extra) else weight
    lead, d = len(batch), len(out_modes)
    order = [*range(lead), *(lead + leg for k in range(d) for leg in (k, d + k))]
    legs = padded.reshape(*batch, *out_modes, *in_modes).permute(order)
    sites = torch.empty(legs.shape, dtype=dtype, device=weight.device).copy_(legs)
    return sites.reshape(*batch, *(o * i for o, i in zip(out_modes, in_modes, strict=True)))


def site_matrix(sites: Tensor, out_modes: Modes, in_modes: Modes, shape: tuple[int, int]) -> Tensor:
    """Inverse of `site_tensor` without batch axes: (m, n), padding cut off."""
    d = len(out_modes)
    legs = sites.reshape([size for pair in zip(out_modes, in_modes, strict=True) for size in pair])
    matrix = legs.permute([*range(0, 2 * d, 2), *range(1, 2 * d, 2)]).reshape(prod(out_modes), prod(in_modes))
    return matrix[: shape[0], : shape[1]]


def rank_bounds(out_modes: Modes, in_modes: Modes) -> Modes:
    """Largest useful bond dimension at each of the d - 1 inner bonds: the smaller side of its unfolding."""
    sites = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return tuple(min(prod(sites[:k]), prod(sites[k:])) for k in range(1, len(sites)))


def _factors(n: int, d: int, least: int) -> list[Modes]:
    if d == 1:
        return [(n,)] if n >= least else []
    return [
        (mode, *rest)
        for mode in range(least, round(n ** (1 / d)) + 2)
        if n % mode == 0
        for rest in _factors(n // mode, d - 1, mode)
    ]


def _positive(value: int, name: str, caller: str) -> int:
    try:
        number = index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ShapeError(f"{caller}: {name} got {value!r}; expected integers of at least 1.")
    return number
