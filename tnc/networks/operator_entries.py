"""Matrices that are only known by their products, read a row or a column at a time: sources of cross approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tnc.networks.entries import Estimate, Probe, estimated, real_values
from tnc.networks.from_operator import LinearMap
from tnc.terms import Mpo

_LINES = 64  # unit vectors multiplied at a time


class TwoSidedMap(LinearMap, Protocol):
    """A `LinearMap` with its adjoint, as ``scipy.sparse.linalg.aslinearoperator(A)`` has it."""

    def rmatmat(self, columns: Any, /) -> Any:  # noqa: ANN401
        """``Aᵀ @ columns``: numpy float64 (out_features, k) to (in_features, k)."""


@dataclass(frozen=True, eq=False)
class OperatorEntries:
    """A matrix given by its products: a place is read with its whole column, or its row where that takes fewer.

    Attributes:
        operator: the map with its adjoint.
        directions: random vectors behind an error estimate; all unit vectors where there are no more.
        draws: random places looked at before each search for a pivot.
    """

    operator: TwoSidedMap
    directions: int = 16
    draws: int = 1
    unit: str = "products"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return int(self.operator.shape[0]), int(self.operator.shape[1])

    def read(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
        """Products with unit vectors, 64 at a time.

        Raises:
            ShapeError, NonFiniteError: if a product has another shape, or holds NaN or Inf.
        """
        by_column, by_row = (torch.unique(side, return_inverse=True) for side in (columns, rows))
        on_columns = len(by_column[0]) <= len(by_row[0])
        (lines, line), place = (by_column, rows) if on_columns else (by_row, columns)
        values = torch.empty(len(rows), dtype=torch.float64)
        for start in range(0, len(lines), _LINES):
            chunk = lines[start : start + _LINES]
            units = torch.zeros(self.shape[int(on_columns)], len(chunk), dtype=torch.float64)
            units[chunk, torch.arange(len(chunk))] = 1
            here = (line >= start) & (line < start + len(chunk))
            values[here] = self._product(units, adjoint=not on_columns)[place[here], line[here] - start]
        return values, len(lines)

    def probe(self, generator: torch.Generator) -> Probe:
        """Products with random Gaussian vectors, or with all unit vectors."""
        columns = self.shape[1]
        everything = columns <= self.directions
        inputs = (
            torch.eye(columns, dtype=torch.float64)
            if everything
            else torch.randn(columns, self.directions, generator=generator, dtype=torch.float64)
        )
        return _Products(inputs, self._product(inputs, adjoint=False), inputs.shape[1], everything)

    def _product(self, columns: Tensor, *, adjoint: bool) -> Tensor:
        product = self.operator.rmatmat if adjoint else self.operator.matmat
        return real_values(product(columns.numpy()), (self.shape[int(adjoint)], columns.shape[1]), "product")


@dataclass(frozen=True, eq=False)
class _Products:
    inputs: Tensor
    outputs: Tensor
    cost: int
    everything: bool

    def worst(self, mpo: Mpo | None = None) -> tuple[int, int]:
        """In the row of largest norm, the largest entry of the estimate ``(E g) gᵀ`` of the difference E."""
        difference = self._difference(mpo)
        row = difference.square().sum(1).argmax()
        return int(row), int((self.inputs @ difference[row]).abs().argmax())

    def error(self, mpo: Mpo) -> Estimate:
        errors = self._difference(mpo).square().sum(0)
        return estimated(errors, self.outputs.square().sum(0), everything=self.everything)

    def _difference(self, mpo: Mpo | None) -> Tensor:
        return self.outputs if mpo is None else self.outputs - mpo.linear(self.inputs.T).T
