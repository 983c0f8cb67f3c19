"""`TrellisFormat`: trellis-coded quantization, where a code means something only with the codes before it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats.number import WholeBits, register_format

_WORD = 0xFFFFFFFF


def _one_mad(state: Tensor) -> Tensor:
    """QTIP's 1MAD: the sum of the four bytes of a multiplied state, shifted and scaled to variance 1."""
    word = (state * 34038481 + 76625530) & _WORD
    total = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)
    return (total.to(torch.float32) - 510) / 147.800537109375


_HALF_MAGIC = struct.unpack("<H", struct.pack("<e", 0.922))[0]


def _three_inst(state: Tensor) -> Tensor:
    """QTIP's 3INST: the sum of two float16 made of the bits of a multiplied state, here scaled to variance 1."""
    word = (state * 89226354 + 64248484) & _WORD
    word = (word & 0x8FFF8FFF) ^ (_HALF_MAGIC << 16 | _HALF_MAGIC)
    halves = [(part & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.float16) for part in (word, word >> 16)]
    total: Tensor = halves[0].to(torch.float32) + halves[1].to(torch.float32)
    return total / 1.236


CODES: dict[str, Callable[[Tensor], Tensor]] = {"1mad": _one_mad, "3inst": _three_inst}
"""State (int64) to a level, pseudo-random and near Gaussian, in a few integer operations."""

PATHS = ("column", "diagonal")
"""Ways of a sequence through the matrix."""

_GAIN = {2: 1.02, 3: 1.07, 4: 1.1}  # scale over root mean square: least error on Gaussian entries, 12 bits


@register_format
@dataclass(frozen=True)
class TrellisFormat(WholeBits):
    """Bitshift trellis with computed codes (QTIP, arXiv:2406.11235): ``scale * code(state)``.

    Going down a line, each entry has ``bits`` new bits; its state is the last ``state_bits`` bits, its level
    a hash of the state. A line is cut into sequences of about ``length`` rows, each closed to a ring
    (tail-biting: the first states reach back to the last rows), so exactly ``bits`` bits an entry are stored
    and every entry can be decoded by itself. QTIP runs a sequence over a tile of 16 x 16. Here a line is a column,
    so that GPTQ's feedback acts between all columns; or an anti-diagonal, ``i + j`` constant, whose entries give
    each other no feedback in two-sided rounding either (`tnc.quant.yaqa`).

    Made for entries that are near Gaussian: rotate first. Zero is not among the levels, and outliers beyond
    about 4 scales are cut.

    Attributes:
        bits: 2, 3 or 4.
        state_bits: a multiple of ``bits`` up to 16, usefully 12 to 16; the encoder's time and memory grow as
            ``2**state_bits``.
        code: a name of `CODES`.
        length: longest sequence, in rows. Below 64 the ring costs some of the gain: at 2 bits the squared error of a
            Gaussian is 0.117 with 16 rows, 0.082 with 32, 0.076 with 64, 0.074 with 256.
        path: a name of `PATHS`: what a line is.
        group_size: input columns that share a scale; ``None`` is one scale a row.
        scale: storage of the scales, as in `tnc.formats.SCALES`.
        pad: whether a group size that does not divide in_features is met by padding, stored and counted; not with
            anti-diagonals, which would run through the padding.

    Raises:
        FormatError: for values outside of these.
    """

    bits: int
    state_bits: int = 12
    code: str = "1mad"
    length: int = 256
    path: str = "column"
    group_size: int | None = None
    scale: str = "half"
    pad: bool = False
    type: ClassVar[str] = "trellis"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4) or not self.bits <= self.state_bits <= 16 or self.state_bits % self.bits:
            raise FormatError(
                f"TrellisFormat(bits={self.bits}, state_bits={self.state_bits}) is not supported; expected 2, 3 or 4 "
                "bits and a multiple of them up to 16 as state_bits."
            )
        if self.code not in CODES:
            raise FormatError(f"TrellisFormat(code={self.code!r}) is unknown; expected one of {', '.join(CODES)}.")
        if self.length < 1:
            raise FormatError(f"TrellisFormat(length={self.length}) must be at least 1 row.")
        if self.path not in PATHS or (self.pad and self.path != "column"):
            raise FormatError(
                f"TrellisFormat(path={self.path!r}, pad={self.pad}) is not supported; expected {' or '.join(PATHS)}, "
                "the second without padding."
            )
        self.check_blocks()

    @property
    def has_exact_zero(self) -> bool:
        """No."""
        return False

    @property
    def columns_alone(self) -> bool:
        """Only where a line is a column."""
        return self.path == "column"

    def describe(self) -> str:
        """Such as ``trellis2 L12``."""
        path = "" if self.path == "column" else f" {self.path}"
        return f"trellis{self.bits} L{self.state_bits}{path}" + (f" g{self.group_size}" if self.group_size else "")

    def sequences(self, rows: int) -> list[tuple[int, int]]:
        """(first row, row after the last) of every sequence of a line of ``rows`` rows; lengths differ by at most 1."""
        count = max(1, -(-rows // self.length))
        short, longer = divmod(rows, count)
        ends = [(i + 1) * short + min(i + 1, longer) for i in range(count)]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def states(self, codes: Tensor) -> Tensor:
        """States (m, ...) int64 of codes (m, ...): the bits of an entry and of those before it in its ring."""
        lines = codes.to(torch.int64).reshape(len(codes), -1)
        if self.path == "diagonal":
            lines = lines.reshape(-1, 1)  # one line of lines
            previous = _before_on_diagonals(len(codes), codes.numel() // max(len(codes), 1), self.length, codes.device)
        else:
            before = [last - 1 if row == first else row - 1 for first, last in self.sequences(len(codes))
                      for row in range(first, last)]  # fmt: skip
            previous = torch.tensor(before, dtype=torch.int64, device=codes.device)
        state, shifted = lines, lines
        for i in range(1, self.state_bits // self.bits):
            shifted = shifted[previous]
            state = state | shifted << self.bits * i
        return state.reshape(codes.shape)

    def ring_levels(self, codes: Tensor) -> Tensor:
        """Levels (T, B) float32 of the codes (T, B) of whole rings."""
        ring = codes.to(torch.int64)
        digits = range(self.state_bits // self.bits)
        state = torch.stack([ring.roll(i, 0) << self.bits * i for i in digits]).sum(0)
        return CODES[self.code](state)

    def decode(self, codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Levels of codes (m, ...), all rows of a column together; all columns, where lines are anti-diagonals."""
        return CODES[self.code](self.states(codes)).to(dtype)

    def full_scale(self, tiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The root mean square of the block times a gain that is best for a Gaussian."""
        largest = torch.maximum(high, -low)
        unit = tiles / largest.masked_fill(largest == 0, torch.inf).unsqueeze(-1)
        return unit.square().mean(-1).sqrt() * largest * _GAIN[self.bits]

    def clip_factors(self, ratios: tuple[float, ...]) -> tuple[float, ...]:
        """The first ratio only: levels are no range that could be clipped."""
        return ratios[:1]


def _before_on_diagonals(rows: int, columns: int, length: int, device: torch.device) -> Tensor:
    """(rows * columns,) flat number of the entry before each one in its ring: one row up and one column on."""
    i = torch.arange(rows, device=device).unsqueeze(1)
    line = i + torch.arange(columns, device=device)
    first = (line - (columns - 1)).clamp_min(0)
    size = line.clamp_max(rows - 1) - first + 1
    count = (size + length - 1) // length
    short = size // count  # as `sequences` cuts a line: the longer sequences first
    place, longer = i - first, (size - short * count) * (short + 1)
    begun = torch.where(place < longer, place % (short + 1), (place - longer) % short)
    own = torch.where(place < longer, short + 1, short)
    row = torch.where(begun == 0, i + own - 1, i - 1)
    return (row * columns + line - row).flatten()
