"""Trellis codes for the fused kernels on a GPU: one stream of words, and where states that it shows are wrong.

The words of `TrellisWords` lie one unit after another, behind one row of words for the codes before the first unit:
those of sequences that begin in the first row of the matrix, at their ends. The other sequences begin among the words
of others; there the first states are not those that the words show. A *fix* names such an entry, and by how much its
level, a whole number, is more than that of the words: ``difference << (16 + b) | row << 16 | column``, the row in its
unit of ``2**b`` rows, those of a unit together. An *item* is the share of one program, of one unit: `EACH` of them, or
a multiple of that where a unit has so many that it would have more than `MOST` items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnc.kernels.trellis_words import PLANES, TrellisWords

EACH = 256  # fixes that a program takes at a time
MOST = 32  # items of a unit
TAIL = 160  # words after the last that a load may touch: 128 lines and a unit's rows


@dataclass(frozen=True)
class Stream:
    """How the codes of a weight are laid out for a GPU: ``words`` of anti-diagonals, sequences by fixes."""

    words: TrellisWords

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """``stream``, ``fixes``, ``items`` (their units), and ``firsts`` (2, units + 1), int32.

        ``firsts`` are the number of the first fix of every unit, and that of its first item.
        """
        words = self.words
        line, start, before = (t.to(codes.device) for t in words.beginnings(codes))
        front = torch.zeros(words.lines, dtype=torch.int32, device=codes.device)
        place = line + words.skew * words.unit
        top = (start == 0) & (place < words.lines)
        front[place[top]] = before[top].to(torch.int32)
        stream = pad(torch.cat([front, words.words(codes).flatten()]), (0, TAIL))
        unit, within, column, difference = self._differences(stream, codes, line, start, before)
        fixes = difference << (16 + self._row_bits) | within << 16 | column
        order = torch.argsort(unit, stable=True)
        counts = torch.bincount(unit, minlength=words.units)
        shares = items_of(counts)
        firsts = pad(torch.stack([counts.cumsum(0), shares.cumsum(0)]), (1, 0))
        items = torch.repeat_interleave(torch.arange(words.units, device=codes.device), shares)
        found = {"stream": stream, "fixes": fixes[order], "items": items, "firsts": firsts}
        return {name: tensor.to(torch.int32) for name, tensor in found.items()}

    def _differences(
        self, stream: Tensor, codes: Tensor, line: Tensor, start: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit, row in it, column and difference of the level of every entry whose state is not the one shown."""
        words, found = self.words, []
        for back in range(words.back):
            row, column = start + back, line - words.skew * (start + back)
            real = (row < words.rows) & (column >= 0)
            line, start, state, row, column = (t[real] for t in (line, start, state, row, column))
            state = (state << words.format.bits | codes[row, column]) & ((1 << words.format.state_bits) - 1)
            difference = _total(state) - _total(self.shown(stream, row, column))
            found.append(torch.stack([row // words.unit, row % words.unit, column, difference])[:, difference != 0])
        unit, within, column, difference = torch.cat(found, 1) if found else torch.empty(4, 0, dtype=torch.int64)
        return unit, within, column, difference

    @property
    def _row_bits(self) -> int:
        return self.words.unit.bit_length() - 1

    def codes(self, stream: Tensor) -> Tensor:
        """Inverse of `pack`: uint8 codes (rows, columns)."""
        words = self.words
        shape = words.units, PLANES[words.format.bits], words.lines
        return words.codes(stream[words.lines : -TAIL].reshape(shape))

    def shown(self, stream: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """States (int64) of entries as the words show them."""
        words, bits = self.words, self.words.format.bits
        unit, r = row // words.unit, row % words.unit
        end = bits * (r + 1)
        plane = (end - 1) // 32
        shift = 32 * (plane + 1) - end
        line = (unit * PLANES[bits] + 1 + plane) * words.lines + column + words.skew * r
        above = line - words.lines + torch.where(plane == 0, words.skew * words.unit, 0)
        low, high = (stream[place].to(torch.int64) & 0xFFFFFFFF for place in (line, above))
        return (high << 32 | low) >> shift & ((1 << words.format.state_bits) - 1)


def items_of(fixes: Tensor) -> Tensor:
    """How many items the fixes of a unit make."""
    size = ((fixes + MOST * EACH - 1) // (MOST * EACH)).clamp_min(1) * EACH
    return (fixes + size - 1) // size


def _total(state: Tensor) -> Tensor:
    """The sum of bytes of the code 1mad."""
    word = (state * 34038481 + 76625530) & 0xFFFFFFFF
    return (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)
