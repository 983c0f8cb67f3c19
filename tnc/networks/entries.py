"""Matrices that are only known entry by entry: what cross approximation reads, and how it judges what it found.

A source answers two questions: what stands at these places, and how far an operator is from it. The second is asked
at places, or along directions, that had no say in the fit, so its answer is an unbiased estimate of the squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from tnc.errors import ShapeError, check_finite
from tnc.terms import Mpo

_PLACES = 1024  # entries of an operator evaluated at a time


@dataclass(frozen=True)
class Estimate:
    """A relative Frobenius error from a sample, and its standard error (0 where the sample is everything)."""

    error: float
    standard_error: float


class Probe(Protocol):
    """What was read of a source to judge operators by."""

    @property
    def cost(self) -> int:
        """What reading it took, in the unit of the source."""

    def worst(self, mpo: Mpo | None = None) -> tuple[int, int]:
        """Place (row, column) at which an operator, ``None`` is zero, seems farthest off."""

    def error(self, mpo: Mpo) -> Estimate:
        """Relative error of an operator."""


class EntrySource(Protocol):
    """A matrix that cross approximation can read."""

    @property
    def draws(self) -> int:
        """Random places looked at before each search for a pivot."""

    @property
    def unit(self) -> str:
        """What is counted."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def read(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
        """Entries at the places (rows[k], columns[k]), float64, and what they cost."""

    def probe(self, generator: torch.Generator) -> Probe:
        """A fresh sample."""


@dataclass(frozen=True)
class Entries:
    """A matrix given by a function of its indices.

    Attributes:
        function: (rows, columns), two int64 tensors (k,), to the k entries at these places: a tensor or a numpy array.
        shape: (out_features, in_features).
        samples: random entries behind an error estimate; all of them where there are no more.
        draws: random places looked at before each search for a pivot.
    """

    function: Callable[[Tensor, Tensor], Any]
    shape: tuple[int, int]
    samples: int = 2000
    draws: int = 32
    unit: str = "entries"

    def read(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
        """The function's values.

        Raises:
            ShapeError: if they are not k real numbers.
            NonFiniteError: if one is NaN or Inf.
        """
        return real_values(self.function(rows, columns), (len(rows),), "entries"), len(rows)

    def probe(self, generator: torch.Generator) -> Probe:
        """Random places without repetition, or all."""
        size = self.shape[0] * self.shape[1]
        if size <= self.samples:
            places = torch.arange(size)
        else:
            places = torch.unique(torch.randint(size, (self.samples,), generator=generator))
        rows, columns = places // self.shape[1], places % self.shape[1]
        values, cost = self.read(rows, columns)
        return _Places(rows, columns, values, cost, everything=cost == size)


@dataclass(frozen=True, eq=False)
class _Places:
    rows: Tensor
    columns: Tensor
    values: Tensor
    cost: int
    everything: bool

    def worst(self, mpo: Mpo | None = None) -> tuple[int, int]:
        at = int(self._difference(mpo).abs().argmax())
        return int(self.rows[at]), int(self.columns[at])

    def error(self, mpo: Mpo) -> Estimate:
        return estimated(self._difference(mpo).square(), self.values.square(), everything=self.everything)

    def _difference(self, mpo: Mpo | None) -> Tensor:
        return self.values if mpo is None else self.values - mpo_entries(mpo, self.rows, self.columns)


def mpo_entries(mpo: Mpo, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of an operator at the places (rows[k], columns[k]), float64, without its matrix.

    Cost: ``2 Σ r_{k-1} r_k`` flops an entry.
    """
    parts = [
        _entries(mpo, r, c) for r, c in zip(*(torch.split(side, _PLACES) for side in (rows, columns)), strict=True)
    ]
    return torch.cat(parts)


def _entries(mpo: Mpo, rows: Tensor, columns: Tensor) -> Tensor:
    """From the last site to the first: the state is (places, r_prev)."""
    state = torch.ones(len(rows), 1, dtype=torch.float64)
    for core in reversed(mpo.cores):
        chosen = core.double()[:, rows % core.shape[1], columns % core.shape[2]]  # (r_prev, places, r_next)
        state = torch.einsum("akb,kb->ka", chosen, state)
        rows, columns = rows // core.shape[1], columns // core.shape[2]
    return state[:, 0]


def estimated(errors: Tensor, sizes: Tensor, *, everything: bool) -> Estimate:
    """Root of the ratio of two sums of squares, with the standard error of a ratio of means."""
    total = float(sizes.sum())
    if total == 0:
        return Estimate(0.0 if float(errors.sum()) == 0 else 1.0, 0.0)
    ratio = float(errors.sum()) / total
    if everything or ratio == 0:
        return Estimate(ratio**0.5, 0.0)
    count = len(errors)
    spread = float((errors - ratio * sizes).square().sum()) * count / max(count - 1, 1)
    return Estimate(ratio**0.5, spread**0.5 / total / (2 * ratio**0.5))


def real_values(values: Any, shape: tuple[int, ...], name: str) -> Tensor:  # noqa: ANN401
    """``values`` as a float64 tensor on the CPU, checked."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(numpy.asarray(values))
    if tuple(tensor.shape) != shape or tensor.is_complex():
        raise ShapeError(
            f"{name} came back as {tensor.dtype} of shape {tuple(tensor.shape)}; expected real numbers of shape "
            f"{shape}."
        )
    return check_finite(tensor.detach().to("cpu", torch.float64), name)
