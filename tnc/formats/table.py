"""`TableFormat`: levels from a table, such as NF4, FP4, MXFP4, NVFP4, FP8 and ternary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats.number import NumberFormat, register_format
from tnc.formats.packing import pack, pack_ternary, packed_length, unpack, unpack_ternary
from tnc.formats.tables import table_values


@register_format
@dataclass(frozen=True)
class TableFormat(NumberFormat):
    """``scale * table[code]``.

    Three levels are packed five to a byte (1.6 bits a code), other tables by whole bits; the codes of
    ``"e2m1"``, ``"e4m3"`` and ``"e5m2"`` are the bit patterns of those floats.

    Attributes:
        table: a name of `tnc.formats.TABLES`, or 2 to 256 levels in the order of the codes (NaN: no number).
        group_size: input columns that share a scale; ``None`` is the whole row.
        group_rows: rows that share a scale; ``None`` is all of them. Blocks of several rows are cut off at the
            edges of a matrix they do not divide; nothing is padded.
        scale: storage of the scales, as in `tnc.formats.SCALES`.
        pad: whether a group size that does not divide in_features is met by padding, stored and counted.

    Raises:
        FormatError: for an unknown table or storage of scales, or group sizes below 1.
    """

    table: str | tuple[float, ...]
    group_size: int | None = None
    group_rows: int | None = 1
    scale: str = "half"
    pad: bool = False
    type: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        if not isinstance(self.table, str):
            object.__setattr__(self, "table", tuple(float(v) for v in self.table))
        table_values(self.table)
        self.check_blocks()

    @property
    def values(self) -> tuple[float, ...]:
        """Levels in the order of the codes."""
        return table_values(self.table)

    @property
    def levels(self) -> int:
        """Number of codes."""
        return len(self.values)

    @property
    def code_bits(self) -> float:
        """Stored bits a code."""
        return 1.6 if self.levels == 3 else float(math.ceil(math.log2(self.levels)))

    @property
    def has_exact_zero(self) -> bool:
        """Whether 0 is in the table."""
        return 0.0 in self.values

    def describe(self) -> str:
        """Such as ``nf4 g64``."""
        kind = self.table if isinstance(self.table, str) else f"table of {self.levels}"
        block = {1: f" g{self.group_size}" if self.group_size else "", None: " per tensor"}
        size = block.get(self.group_rows, f" {self.group_rows}x{self.group_size or 'all'}")
        return kind + size + ("" if self.scale == "half" else f" {self.scale}")

    def decode(self, codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Levels by code."""
        table = torch.tensor(self.values, dtype=dtype, device=codes.device)
        return table[codes.to(torch.int32)]

    def pack(self, codes: Tensor) -> Tensor:
        """Codes to bytes along the last axis."""
        if self.levels == 3:
            return pack_ternary(codes)
        if codes.numel() and int(codes.max()) >= self.levels:
            raise FormatError(
                f"pack got code {int(codes.max())}; expected 0 <= code < {self.levels} of {self.describe()}."
            )
        return pack(codes, int(self.code_bits))

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """Inverse of `pack`: uint8 codes."""
        return unpack_ternary(packed, count) if self.levels == 3 else unpack(packed, int(self.code_bits), count)

    def packed_length(self, count: int) -> int:
        """Bytes of ``count`` codes."""
        return -(-count // 5) if self.levels == 3 else packed_length(count, int(self.code_bits))

    def full_scale(self, tiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The least scale that reaches both ends; for ternary the mean of ``|w|``."""
        if self.table == "ternary":
            return tiles.abs().mean(-1)
        finite = [v for v in self.values if math.isfinite(v)]
        top, bottom = max(*finite, 0.0) or math.inf, min(*finite, 0.0) or -math.inf
        return torch.maximum(high / top, low / bottom)

    def clip_factors(self, ratios: tuple[float, ...]) -> tuple[float, ...]:
        """The ratios; for ternary also twice each, as the best scale of a Gaussian is 1.53 mean(|w|)."""
        if self.table != "ternary" or len(ratios) == 1:
            return ratios
        return ratios[0], *(2 * ratio for ratio in ratios)
