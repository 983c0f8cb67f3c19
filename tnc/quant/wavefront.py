"""Two-sided rounding with feedback, many entries at a time.

Entry (i, j) of ``Uᵀ Δ V`` needs the errors Δ of all entries above and to the left, so entries with equal
``i + j`` are independent. Tiles of the matrix go by anti-diagonals of tiles, all tiles of one at once, and inside
a tile entries go by anti-diagonals: ``(m/t + n/t)(2t - 1)`` steps on up to ``min(m, n)`` entries, instead of
``m n`` steps on one. What lies outside a tile reaches it by matrix products.

Inside a tile rows are stored last row first: then anti-diagonals are diagonals, which are views.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnc.quant.levels import Levels


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Tiles (tile rows, tile columns, t, t) of padded matrices, rows of a tile last first."""

    weight: Tensor
    levels: Levels
    rows: Tensor  # (tile rows, t, t): U of the tile transposed, both axes last first
    columns: Tensor  # (tile columns, t, t): V of the tile transposed


def round_two_sided(weight: Tensor, levels: Levels, row_factor: Tensor, column_factor: Tensor, tile: int) -> Tensor:
    """Codes (m, n) uint8 such that each entry of ``Uᵀ (W - Q) V`` is that entry's own rounding error.

    Args:
        weight: (m, n) in rounding order, working dtype.
        levels: of every entry, each (m, n).
        row_factor: U (m, m), unit upper triangular.
        column_factor: V (n, n), unit upper triangular.
        tile: side of a tile; changes speed and float rounding only.

    Cost: ``m n (m + n)`` flops in products, ``4 m n t`` outside of them.
    """
    rows, columns = weight.shape
    upper, right = _identity_padded(row_factor, tile), _identity_padded(column_factor, tile)
    tiles = _Tiles(
        _tiled(weight, tile),
        levels.at(partial(_tiled, tile=tile)),
        torch.stack([_diagonal_tile(upper, k, tile).T.flip(0, 1) for k in range(len(upper) // tile)]),
        torch.stack([_diagonal_tile(right, k, tile).T for k in range(len(right) // tile)]),
    )
    errors = weight.new_zeros(len(upper), len(right))  # Δ
    summed = torch.zeros_like(errors)  # Δ V
    codes = torch.zeros_like(tiles.weight, dtype=torch.uint8)
    down, across = tiles.weight.shape[:2]
    for step in range(down + across - 1):
        places = [(a, step - a) for a in range(max(0, step - across + 1), min(down, step + 1))]
        outer = [_outside(errors, summed, upper, right, place, tile) for place in places]
        at = torch.tensor([a for a, _ in places]), torch.tensor([b for _, b in places])
        base = tiles.weight[at] + torch.stack([shift.flip(0) for _, shift in outer])
        picked = tiles.levels.at(itemgetter(at))
        codes[at], error, own = _round_tiles(tiles.weight[at], base, picked, tiles.rows[at[0]], tiles.columns[at[1]])
        for (a, b), (before, _), e, p in zip(places, outer, error, own, strict=True):
            block = slice(a * tile, a * tile + tile), slice(b * tile, b * tile + tile)
            errors[block], summed[block] = e.flip(0), p + before
    return _untiled(codes)[:rows, :columns]


def _outside(
    errors: Tensor, summed: Tensor, upper: Tensor, right: Tensor, place: tuple[int, int], tile: int
) -> tuple[Tensor, Tensor]:
    """What earlier tiles add to one tile (t, t): to its ``Δ V``, and to its targets."""
    row, column = place[0] * tile, place[1] * tile
    rows, columns = slice(row, row + tile), slice(column, column + tile)
    before = errors[rows, :column] @ right[:column, columns]
    above = upper[:row, rows].T @ summed[:row, columns]
    return before, torch.addmm(above, upper[rows, rows].T, before)


def _round_tiles(
    weight: Tensor, base: Tensor, levels: Levels, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and Δ of K tiles (K, t, t), rows last first, and their own part of ``Δ V`` in natural row order."""
    size = weight.shape[-1]
    errors, summed = torch.zeros_like(weight), torch.zeros_like(weight)  # summed: Δ V as (K, column, row last first)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for offset in range(1 - size, size):  # entries with column - (reversed row) = offset
        low, high = max(0, -offset), min(size, size - offset)
        row, column = slice(low, high), slice(low + offset, high + offset)
        own = (errors[:, row] * columns[:, column]).sum(-1)
        above = (rows[:, row] * summed[:, column]).sum(-1)
        diagonal = partial(_diagonal, offset=offset)
        place = levels.at(diagonal)
        chosen = place.nearest(diagonal(base) + own + above)
        error = diagonal(weight) - place.values(chosen)
        diagonal(codes).copy_(place.codes(chosen))
        diagonal(errors).copy_(error)
        _diagonal(summed, -offset).copy_(own + error)
    return codes, errors, summed.mT.flip(1)


def _diagonal(tiles: Tensor, offset: int) -> Tensor:
    return tiles.diagonal(offset, 1, 2)


def _diagonal_tile(matrix: Tensor, number: int, tile: int) -> Tensor:
    block = slice(number * tile, number * tile + tile)
    return matrix[block, block]


def _identity_padded(factor: Tensor, tile: int) -> Tensor:
    """Factor padded to whole tiles with ones on the diagonal."""
    short = -len(factor) % tile
    padded = pad(factor, (0, short, 0, short))
    padded.diagonal()[len(factor) :] = 1
    return padded


def _tiled(matrix: Tensor, tile: int) -> Tensor:
    """(m, n) as tiles (m/t, n/t, t, t), rows of a tile last first; padded with zeros."""
    padded = pad(matrix, (0, -matrix.shape[1] % tile, 0, -matrix.shape[0] % tile))
    down, across = padded.shape[0] // tile, padded.shape[1] // tile
    return padded.reshape(down, tile, across, tile).transpose(1, 2).flip(2).contiguous()


def _untiled(tiles: Tensor) -> Tensor:
    down, across, tile, _ = tiles.shape
    return tiles.flip(2).transpose(1, 2).reshape(down * tile, across * tile)
