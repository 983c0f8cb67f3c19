"""Number formats of the two factors of a low-rank term."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tnc.errors import FormatError
from tnc.formats import NumberFormat


@dataclass(frozen=True)
class FactorFormats:
    """Number formats of the two factors of a low-rank term.

    Attributes:
        left: of the factor (out_features, rank).
        right: of the factor (rank, in_features).
    """

    left: NumberFormat
    right: NumberFormat

    @classmethod
    def of(cls, format: NumberFormat | FactorFormats) -> FactorFormats:
        """A format for both; rows of ``left`` are short, so there its group size becomes one group a row."""
        return format if isinstance(format, FactorFormats) else cls(replace(format, group_size=None), format)  # type: ignore[type-var]

    def stored_bits(self, shape: tuple[int, int], rank: int) -> int:
        """Bits of both factors of a weight ``shape``; codes, scales and zero points.

        Raises:
            FormatError: if a group size does not divide the row of its factor.
        """
        if rank == 0:
            return 0
        return self.left.stored_bits((shape[0], rank)) + self.right.stored_bits((rank, shape[1]))

    def fits(self, rank: int) -> bool:
        """Whether rows of ``left`` of this length can be stored."""
        try:
            self.left.group_of(max(rank, 1))
        except FormatError:
            return False
        return True
