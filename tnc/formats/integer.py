"""`IntFormat`: evenly spaced levels, ``code - zero``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats.number import WholeBits, register_format

SUPPORTED_BITS = (2, 3, 4, 5, 6, 8)


@register_format
@dataclass(frozen=True)
class IntFormat(WholeBits):
    """Affine integer format: ``scale * (code - zero)``.

    Attributes:
        bits: bits a code: 2, 3, 4, 5, 6 or 8.
        group_size: input columns that share a scale; ``None`` is one group a row (per output channel).
        symmetric: zero point fixed at mid-range ``2**(bits-1)`` and not stored; otherwise an integer zero
            of ``bits`` bits is stored for each group.
        scale: storage of the scales: ``"half"`` (float16, or bfloat16 where float16's range is left),
            ``"bfloat16"``, ``"float32"``, or ``"uint8"`` (double quantization, see `tnc.formats.scale`).
        pad: whether a group size that does not divide in_features is met by padding, stored and counted.

    Bits per weight with 16-bit scales: ``bits + (16 + bits) / group_size``, without the
    ``bits / group_size`` when symmetric.

    Raises:
        FormatError: for other widths, a group size below 1, or an unknown storage of scales.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    scale: str = "half"
    pad: bool = False
    type: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise FormatError(
                f"IntFormat(bits={self.bits}) is not supported; expected one of "
                f"{', '.join(map(str, SUPPORTED_BITS))} bits."
            )
        self.check_blocks()

    @property
    def has_zero(self) -> bool:
        """Whether zero points are stored."""
        return not self.symmetric

    @property
    def middle(self) -> int:
        """Mid-range."""
        return self.levels // 2

    def describe(self) -> str:
        """Such as ``int3 g64``."""
        kind = f"int{self.bits}" + (" symmetric" if self.symmetric else "")
        return (
            kind
            + (f" g{self.group_size}" if self.group_size else "")
            + ("" if self.scale == "half" else f" {self.scale}")
        )

    def decode(self, codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``code - zero``, with `middle` where ``zero`` is ``None``."""
        return codes.to(dtype) - (self.middle if zero is None else zero.to(dtype))

    def full_scale(self, tiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Asymmetric: the range over its steps; symmetric: the least that reaches both ends."""
        if self.symmetric:
            return torch.maximum(high / (self.middle - 1), -low / self.middle)
        steps = self.levels - 1
        return high / steps - low / steps  # not (high - low) / steps, which overflows for the largest float32
