"""`TrellisFormat`: trellis-coded quantization, where a code means something only with the codes before it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats.number import NumberFormat, check_group, register_format
from tnc.formats.scale import scale_format

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

_GAIN = {
    2: 1.02,
    3: 1.07,
    4: 1.1,
}  # scale over root mean square: least error on Gaussian entries, 12 bits


@register_format
@dataclass(frozen=True)
class TrellisFormat(NumberFormat):
    """Bitshift trellis with computed codes (QTIP, arXiv:2406.11235): ``scale * code(state)``.

    Going down a column, each entry has ``bits`` new bits; its state is the last ``state_bits`` bits, its level
    a hash of the state. A column is cut into sequences of about ``length`` rows, each closed to a ring
    (tail-biting: the first states reach back to the last rows), so exactly ``bits`` bits an entry are stored
    and every entry can be decoded by itself. QTIP runs a sequence over a tile of 16 x 16; a sequence within
    one column lets GPTQ's feedback act between all columns.

    Made for entries that are near Gaussian: rotate first. Zero is not among the levels, and outliers beyond
    about 4 scales are cut.

    Attributes:
        bits: 2, 3 or 4.
        state_bits: a multiple of ``bits`` up to 16, usefully 12 to 16; the encoder's time and memory grow as
            ``2**state_bits``.
        code: a name of `CODES`.
        length: longest sequence, in rows.
        group_size: input columns that share a scale; ``None`` is one scale a row.
        scale: storage of the scales, as in `tnc.formats.SCALES`.
        pad: whether a group size that does not divide in_features is met by padding, stored and counted.

    Raises:
        FormatError: for values outside of these.
    """

    bits: int
    state_bits: int = 12
    code: str = "1mad"
    length: int = 256
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
        check_group("TrellisFormat", self.group_size)
        scale_format(self.scale)

    @property
    def code_bits(self) -> float:
        """``bits``."""
        return self.bits

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def has_exact_zero(self) -> bool:
        """No."""
        return False

    def describe(self) -> str:
        """Such as ``trellis2 L12``."""
        return f"trellis{self.bits} L{self.state_bits}" + (f" g{self.group_size}" if self.group_size else "")

    def sequences(self, rows: int) -> list[tuple[int, int]]:
        """(first row, row after the last) of every sequence of a column; lengths differ by at most 1."""
        count = max(1, -(-rows // self.length))
        short, longer = divmod(rows, count)
        ends = [(i + 1) * short + min(i + 1, longer) for i in range(count)]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def states(self, codes: Tensor) -> Tensor:
        """States (m, ...) int64 of codes (m, ...): the bits of an entry and of those before it in its ring."""
        codes = codes.to(torch.int64)
        before = [last - 1 if row == first else row - 1 for first, last in self.sequences(len(codes))
                  for row in range(first, last)]  # fmt: skip
        previous = torch.tensor(before, dtype=torch.int64, device=codes.device)
        state, shifted = codes, codes
        for i in range(1, self.state_bits // self.bits):
            shifted = shifted[previous]
            state = state | shifted << self.bits * i
        return state

    def decode(self, codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Levels of codes (m, ...), all rows of a column together."""
        return CODES[self.code](self.states(codes)).to(dtype)

    def full_scale(self, tiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The root mean square of the block times a gain that is best for a Gaussian."""
        largest = torch.maximum(high, -low)
        unit = tiles / largest.masked_fill(largest == 0, torch.inf).unsqueeze(-1)
        return unit.square().mean(-1).sqrt() * largest * _GAIN[self.bits]

    def clip_factors(self, ratios: tuple[float, ...]) -> tuple[float, ...]:
        """The first ratio only: levels are no range that could be clipped."""
        return ratios[:1]
