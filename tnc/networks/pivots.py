"""Pivots of a cross approximation: which rows and columns of every unfolding are kept, and how one more is found.

At each bond the unfolding is interpolated on a cross of pivot rows and columns, ``M ≈ C P⁻¹ R`` with C its pivot
columns, R its pivot rows and P their intersection. A new pivot is where the interpolation is farthest off along a row
and a column (rook search). Pivots of a bond extend those of its neighbours, so the rows and columns that a search
reads are slices of the cores that follow, and hardly an entry is read that is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tnc.networks.entries import EntrySource
from tnc.networks.modes import Modes
from tnc.terms import Mpo

_ROOK_STEPS = 3  # rows and columns that a search for one pivot visits
_NEGLIGIBLE = 1e-13  # of the largest entry seen: an error that is rounding


@dataclass(frozen=True, eq=False)
class _Pivot:
    """A new pivot of a bond: offsets ``left`` and ``right`` (1, 2), and the entries that the intersection gains."""

    left: Tensor
    right: Tensor
    row: Tensor  # left + rights of the bond (r,)
    column: Tensor  # lefts of the bond + right (r,)
    corner: Tensor  # left + right (1,)


class CrossPivots:
    """The pivots of every bond, and the fibres of the tensor through them.

    A multi-index of some sites is a pair (row, column) of offsets into the matrix, and offsets of sites add. Bond k
    lies before site k; ``lefts[k]`` and ``rights[k]`` (r_k, 2) are the pivots before and behind it. ``fibres[k]``
    (r_k, o_k i_k, r_k+1) holds the entries at left pivot + index of site k + right pivot, ``squares[k]`` (r_k, r_k)
    those at left + right pivots of bond k.
    """

    def __init__(self, source: EntrySource, outs: Modes, ins: Modes, generator: torch.Generator) -> None:
        self.source, self.outs, self.ins, self.generator = source, outs, ins, generator
        self.sites = [_site_offsets(outs, ins, k) for k in range(len(outs))]
        self.reads, self.largest = 0, 0.0
        self.lefts = [torch.zeros(1, 2, dtype=torch.int64)]
        self.rights: list[Tensor] = []
        self.fibres: list[Tensor] = []
        self.squares: list[Tensor] = []

    @property
    def ranks(self) -> tuple[int, ...]:
        """Numbers of pivots of the d + 1 bonds, 1 at both ends."""
        return tuple(map(len, self.rights)) if self.rights else (1,) * (len(self.outs) + 1)

    def start(self, place: tuple[int, int]) -> bool:
        """One pivot, the same entry, at every bond: from ``place`` to the largest entry along one site after another.

        Returns:
            Whether it is not zero.
        """
        indices = [_index_at(self.outs, self.ins, k, place) for k in range(len(self.outs))]
        for k, site in enumerate(self.sites):
            others = sum((s[i] for s, i in zip(self.sites, indices, strict=True)), -site[indices[k]])
            indices[k] = int(self._read(others + site).abs().argmax())
        chosen = torch.stack([s[i] for s, i in zip(self.sites, indices, strict=True)])
        before = torch.cat([self.lefts[0], chosen.cumsum(0)])
        self.lefts = [offset.unsqueeze(0) for offset in before[:-1]]
        self.rights = [(before[-1] - offset).unsqueeze(0) for offset in before]
        self.fibres = [self._fibre(k) for k in range(len(self.sites))]
        self.squares = [self._read(before[-1:]).unsqueeze(0)] * len(self.sites)
        return bool(self.squares[0].any())

    def add_pivot(self, bond: int) -> bool:
        """Extend the cross at a bond to where it is farthest off along a row and a column.

        Returns:
            ``False`` if it is off by no more than rounding there.
        """
        i, j = -1, self.drawn_column(bond)
        down, error = self.column(bond, j)
        for _ in range(_ROOK_STEPS):
            if (found := int(error.abs().argmax())) == i:
                break
            i = found
            across, along = self.row(bond, i)
            if (found := int(along.abs().argmax())) == j:
                break
            j = found
            down, error = self.column(bond, j)
        if float(error[i].abs()) <= _NEGLIGIBLE * self.largest:
            return False
        self._extend(bond, i, j, down, across)
        return True

    def add_place(self, bond: int, place: tuple[int, int]) -> bool:
        """Make an entry of the matrix a pivot of a bond, unless the interpolation there is off by rounding only."""
        left = torch.zeros(1, 2, dtype=torch.int64)
        for k in range(bond):
            left += self.sites[k][_index_at(self.outs, self.ins, k, place)]
        right = torch.tensor([place]) - left
        column, row, corner = (
            self._read(self.lefts[bond] + right),
            self._read(left + self.rights[bond]),
            self._read(left + right),
        )
        if float((corner - row @ torch.linalg.solve(self.squares[bond], column)).abs()) <= _NEGLIGIBLE * self.largest:
            return False
        rows, columns = self._sides(bond)
        pivot = _Pivot(left, right, row, column, corner)
        self._append(bond, pivot, self._read(rows + right), self._read(left + columns))
        return True

    def mpo(self) -> Mpo:
        """The interpolation: ``fibres[k] squares[k + 1]⁻¹`` at every site but the last."""
        last = len(self.sites) - 1
        cores = []
        for k, fibre in enumerate(self.fibres):
            core = fibre if k == last else torch.linalg.solve(self.squares[k + 1], fibre.flatten(0, 1), left=False)
            cores.append(core.reshape(len(fibre), self.outs[k], self.ins[k], -1))
        return Mpo(tuple(cores), self.source.shape)

    def drawn_column(self, bond: int) -> int:
        """Column of the unfolding at the worst of some random places."""
        count = self.source.draws
        rows, columns = self._sides(bond)
        i, j = (torch.randint(len(side), (count,), generator=self.generator) for side in (rows, columns))
        left, right = self._panels(bond)
        guess = (left[i] @ torch.linalg.solve(self.squares[bond], right[:, j])).diagonal()
        return int(j[(self._read(rows[i] + columns[j]) - guess).abs().argmax()])

    def column(self, bond: int, j: int) -> tuple[Tensor, Tensor]:
        """A column of the unfolding (rows) and the error of the interpolation along it."""
        rows, columns = self._sides(bond)
        left, right = self._panels(bond)
        values = self._read(rows + columns[j])
        return values, values - left @ torch.linalg.solve(self.squares[bond], right[:, j])

    def row(self, bond: int, i: int) -> tuple[Tensor, Tensor]:
        """A row of the unfolding (columns) and the error of the interpolation along it."""
        rows, columns = self._sides(bond)
        left, right = self._panels(bond)
        values = self._read(rows[i] + columns)
        return values, values - torch.linalg.solve(self.squares[bond].T, left[i]) @ right

    def _extend(self, bond: int, i: int, j: int, down: Tensor, across: Tensor) -> None:
        """Make row i (its entries ``across``) and column j (``down``) of the unfolding a pivot."""
        rows, columns = self._sides(bond)
        left, right = self._panels(bond)
        pivot = _Pivot(rows[i : i + 1], columns[j : j + 1], left[i], right[:, j], down[i : i + 1])
        self._append(bond, pivot, down, across)

    def _append(self, bond: int, pivot: _Pivot, down: Tensor, across: Tensor) -> None:
        top = torch.cat([self.squares[bond], pivot.column.unsqueeze(1)], dim=1)
        self.squares[bond] = torch.cat([top, torch.cat([pivot.row, pivot.corner]).unsqueeze(0)])
        self.lefts[bond] = torch.cat([self.lefts[bond], pivot.left])
        self.rights[bond] = torch.cat([self.rights[bond], pivot.right])
        before, behind = self.fibres[bond - 1], self.fibres[bond]
        self.fibres[bond - 1] = torch.cat([before, down.reshape(*before.shape[:2], 1)], dim=2)
        self.fibres[bond] = torch.cat([behind, across.reshape(1, *behind.shape[1:])])

    def _sides(self, bond: int) -> tuple[Tensor, Tensor]:
        """Offsets of the rows (left pivots + site before) and columns (site behind + right pivots) of an unfolding."""
        return _sums(self.lefts[bond - 1], self.sites[bond - 1]), _sums(self.sites[bond], self.rights[bond + 1])

    def _panels(self, bond: int) -> tuple[Tensor, Tensor]:
        """Pivot columns C and pivot rows R of the unfolding at a bond."""
        return self.fibres[bond - 1].flatten(0, 1), self.fibres[bond].flatten(1)

    def _fibre(self, k: int) -> Tensor:
        offsets = _sums(_sums(self.lefts[k], self.sites[k]), self.rights[k + 1])
        return self._read(offsets).reshape(len(self.lefts[k]), len(self.sites[k]), len(self.rights[k + 1]))

    def _read(self, offsets: Tensor) -> Tensor:
        """Entries at (k, 2) places, 0 in the padding."""
        rows, columns = offsets.T
        inside = (rows < self.source.shape[0]) & (columns < self.source.shape[1])
        values = torch.zeros(len(offsets), dtype=torch.float64)
        if bool(inside.any()):
            values[inside], cost = self.source.read(rows[inside], columns[inside])
            self.reads += cost
            self.largest = max(self.largest, float(values.abs().max()))
        return values


def _site_offsets(outs: Modes, ins: Modes, k: int) -> Tensor:
    """(o_k i_k, 2) offsets of the indices of site k."""
    rows = torch.arange(outs[k]) * prod(outs[k + 1 :])
    columns = torch.arange(ins[k]) * prod(ins[k + 1 :])
    return torch.cartesian_prod(rows, columns)


def _index_at(outs: Modes, ins: Modes, k: int, place: tuple[int, int]) -> int:
    """Index of site k at a place (row, column)."""
    row, column = (at // prod(modes[k + 1 :]) % modes[k] for at, modes in zip(place, (outs, ins), strict=True))
    return row * ins[k] + column


def _sums(first: Tensor, second: Tensor) -> Tensor:
    """(p, 2) and (q, 2) to (p q, 2): every sum, those of the first offset first."""
    return (first.unsqueeze(1) + second).reshape(-1, 2)
