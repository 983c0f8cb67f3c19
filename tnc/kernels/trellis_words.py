"""Trellis codes as the kernels read them: a state is a window of neighbouring bits of one or two words.

A unit is a number of rows whose codes fill whole words. ``words[unit, plane, line]`` hold the codes of a line in a
unit, the first row's highest, planes one after another. Line l of a unit has in row r the column ``l - r`` where lines
are anti-diagonals, else the column l. So the state of a row, its code and those of the rows before it in the line, are
bits next to one another; those of a unit's first rows begin in the last word of the unit before, at line ``l + rows``.

A sequence is a ring: the rows where one begins reach back to its own end. *Seams* hold the bits that come before such
a row in the place of those in the words, and lie beside the words, for blocks of lines that have any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.formats import TrellisFormat

PLANES = {2: 1, 3: 3, 4: 2}  # bits of a code -> words of a line in a unit
BIAS = 32  # added to the row of a seam in its unit, which may be one of the rows before
UNITS = {"1mad": 1 / 147.800537109375, "3inst": 1 / 1.236}
"""What the kernels leave out of the levels of a code, for the scale of a row to take."""
_NOWHERE = 255  # the row of a line without a seam


@dataclass(frozen=True)
class TrellisWords:
    """How the codes of a weight (rows, columns) are laid out.

    Attributes:
        format: of the codes.
        rows, columns: of the weight.
        block: lines that share a mark; the number of lines is a multiple of it.
    """

    format: TrellisFormat
    rows: int
    columns: int
    block: int

    @property
    def skew(self) -> int:
        """1 where lines are anti-diagonals, 0 where they are columns."""
        return int(self.format.path == "diagonal")

    @property
    def unit(self) -> int:
        """Rows of a unit."""
        return 32 * PLANES[self.format.bits] // self.format.bits

    @property
    def units(self) -> int:
        """Units of the weight."""
        return -(-self.rows // self.unit)

    @property
    def lines(self) -> int:
        """Lines of a unit, those that only fill the last block included."""
        return -(-(self.columns + self.skew * (self.unit - 1)) // self.block) * self.block

    @property
    def back(self) -> int:
        """Codes before an entry that its state holds."""
        return self.format.state_bits // self.format.bits - 1

    def words(self, codes: Tensor) -> Tensor:
        """Codes (rows, columns) as int32 words (units, planes, lines)."""
        bits, planes = self.format.bits, PLANES[self.format.bits]
        words = torch.zeros(self.units, planes, self.lines, dtype=torch.int64, device=codes.device)
        for r in range(self.unit):
            own, end = codes[r :: self.unit].to(torch.int64), bits * (r + 1)
            place = slice(self.skew * r, self.skew * r + self.columns)
            for plane in range((end - bits) // 32, (end - 1) // 32 + 1):  # one or both words that the code lies in
                shift = 32 * (plane + 1) - end
                words[: len(own), plane, place] |= (own << shift if shift >= 0 else own >> -shift) & 0xFFFFFFFF
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    def codes(self, words: Tensor) -> Tensor:
        """Inverse of `words`: uint8 codes (rows, columns)."""
        bits = self.format.bits
        codes = torch.empty(self.units * self.unit, self.columns, dtype=torch.uint8, device=words.device)
        for r in range(self.unit):
            end = bits * (r + 1)
            found = torch.zeros((), dtype=torch.int64, device=words.device)
            place = slice(self.skew * r, self.skew * r + self.columns)
            for plane in range((end - bits) // 32, (end - 1) // 32 + 1):
                shift, word = 32 * (plane + 1) - end, words[:, plane, place].to(torch.int64) & 0xFFFFFFFF
                found = found | (word >> shift if shift >= 0 else word << -shift)
            codes[r :: self.unit] = (found & ((1 << bits) - 1)).to(torch.uint8)
        return codes[: self.rows]

    def seams(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Marks (units, blocks) int32, and seams (found, block) int32.

        A mark is the place of a block's seams, or -1. A seam is ``(row + BIAS) << 16 | bits``: from that row of the
        unit on, which may be one before it, the codes before the row are ``bits``, the last one lowest.
        """
        line, start, before = (t.to(codes.device) for t in self.beginnings(codes))
        unit = torch.cat([start // self.unit, start // self.unit + 1])  # the second where the next unit's rows see it
        start, line, before = start.repeat(2), line.repeat(2), before.repeat(2)
        row, local = start - unit * self.unit, line - self.skew * self.unit * unit
        kept = (row > -self.back) & (unit < self.units) & (local >= 0)
        unit, row, local, before = unit[kept], row[kept], local[kept], before[kept]
        blocks = self.lines // self.block
        place = unit * blocks + local // self.block
        found = torch.zeros(self.units * blocks, dtype=torch.bool, device=codes.device)
        found[place] = True
        marks = torch.where(found, found.cumsum(0) - 1, -1)
        seams = torch.full((int(found.sum()), self.block), _NOWHERE << 16, dtype=torch.int64, device=codes.device)
        seams[marks[place], local % self.block] = (row + BIAS) << 16 | before
        return marks.reshape(self.units, blocks).to(torch.int32), seams.to(torch.int32)

    def beginnings(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of every ring its line, its first row, and the bits of the codes before it."""
        line = torch.arange(self.columns + self.skew * (self.rows - 1))
        first = (line - (self.columns - 1)).clamp_min(0) * self.skew
        size = (self.skew * line + (1 - self.skew) * self.rows).clamp_max(self.rows - self.skew) + self.skew - first
        count = -(-size // self.format.length)
        number = torch.arange(int(count.max())).unsqueeze(1)
        short, longer = size // count, size % count  # as `TrellisFormat.sequences` cuts a line
        start = first + number * short + torch.minimum(number, longer)
        length = short + (number < longer).long()
        real = number < count
        line, start, length = line.expand_as(start)[real], start[real], length[real]
        before = torch.zeros_like(line)
        for back in range(1, self.back + 1):
            row = start + (-back) % length
            code = codes[row.to(codes.device), (line - self.skew * row).to(codes.device)].cpu()
            before |= code.long() << self.format.bits * (back - 1)
        return line, start, before


def refusal(format: TrellisFormat) -> str | None:
    """Why codes of a format are not laid out so, or ``None``."""
    unit, back = 32 * PLANES[format.bits] // format.bits, format.state_bits // format.bits - 1
    if (format.length + 1) // 2 < unit + back:
        return f"sequences of at most {format.length} rows may begin twice in {unit} rows"
    return None
