"""Number formats: how a small integer code stands for a real number.

An affine group format stores ``weight ~ scale * (code - zero)`` with one scale (and, when asymmetric, one
zero) for every ``group_size`` consecutive input columns of a row (MATH.md section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from tnc.errors import FormatError
from tnc.formats.packing import packed_length

SUPPORTED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class IntFormat:
    """Affine integer format of 2, 3, 4 or 8 bits.

    Attributes:
        bits: bits a code.
        group_size: input columns that share a scale; ``None`` is one group a row (per output channel).
        symmetric: zero point fixed at mid-range ``2**(bits-1)`` and not stored; otherwise an integer zero
            of ``bits`` bits is stored for each group.

    Scales take 16 bits (see `tnc.quant.grid`). Bits per weight: ``bits + (16 + bits) / group_size``,
    without the ``bits / group_size`` when symmetric.

    Raises:
        FormatError: for other widths or a group size below 1.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise FormatError(
                f"IntFormat(bits={self.bits}) is not supported; expected one of "
                f"{', '.join(map(str, SUPPORTED_BITS))} bits."
            )
        if self.group_size is not None and self.group_size < 1:
            raise FormatError(
                f"IntFormat(group_size={self.group_size}) must be at least 1; use None for one group a row."
            )

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    def group_of(self, in_features: int) -> int:
        """Columns in a group for a weight with ``in_features`` columns.

        Raises:
            FormatError: if the group size does not divide ``in_features``.
        """
        group = in_features if self.group_size is None else self.group_size
        if in_features % group:
            divisors = [d for d in range(1, in_features + 1) if in_features % d == 0 and d >= 8] or [in_features]
            raise FormatError(
                f"group_size={group} does not divide in_features={in_features}; "
                f"expected a divisor such as {', '.join(map(str, divisors[:8]))}, or None for one group a row."
            )
        return group

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a weight of this shape takes: codes, scales, zero points.

        Raises:
            FormatError: see `group_of`.
        """
        rows, columns = shape
        groups = columns // self.group_of(columns)
        zeros = 0 if self.symmetric else packed_length(groups, self.bits) * 8
        return rows * (packed_length(columns, self.bits) * 8 + 16 * groups + zeros)
