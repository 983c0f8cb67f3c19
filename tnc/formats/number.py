"""`NumberFormat`: how small codes and their scales stand for real numbers.

Every format stores ``weight ~ scale * level``: a scale for every block of entries (`tnc.formats.layout`,
`tnc.formats.scale`) and a level that the code names (MATH.md section 2). A kind of format registers its
``type``, under which files name it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats.layout import Layout
from tnc.formats.packing import pack, packed_length, unpack
from tnc.formats.scale import ScaleFormat, scale_format


class NumberFormat(abc.ABC):
    """What every format knows; subclasses are frozen dataclasses whose fields are JSON-able.

    Attributes:
        type: name of the kind in files.
        group_size: columns that share a scale; ``None`` is the whole row.
        group_rows: rows that share a scale; ``None`` is all of them.
        scale: storage of the scales, a name of `tnc.formats.SCALES`.
        pad: meet a group size that does not divide in_features by padding with codes, stored and counted.
    """

    type: ClassVar[str]
    group_size: int | None
    group_rows: int | None = 1
    scale: str
    pad: bool

    def check_blocks(self) -> None:
        """Raise `FormatError` for a group below 1 or an unknown storage of scales."""
        for field, group in (("group_size", self.group_size), ("group_rows", self.group_rows)):
            if group is not None and group < 1:
                raise FormatError(
                    f"{type(self).__name__}({field}={group}) must be at least 1; use None for one group a row."
                )
        scale_format(self.scale)

    @property
    @abc.abstractmethod
    def code_bits(self) -> float:
        """Stored bits a code; whole except for base-3 packing."""

    @property
    @abc.abstractmethod
    def levels(self) -> int:
        """Number of codes."""

    @abc.abstractmethod
    def describe(self) -> str:
        """A few words, such as ``int3 g64``."""

    @abc.abstractmethod
    def decode(self, codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Levels, in units of the scale: codes (m, ...) to the same shape in ``dtype``.

        Args:
            codes: (m, ...) integers; the first dimension runs over all rows of the matrix.
            zero: broadcastable zero points, or ``None`` for formats without.
            dtype: of the result.
        """

    @abc.abstractmethod
    def full_scale(self, tiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Scale (block rows, groups) of the full range of blocks (block rows, groups, entries).

        ``low <= 0 <= high`` are the ends of the range, (block rows, groups).
        """

    def clip_factors(self, ratios: tuple[float, ...]) -> tuple[float, ...]:
        """Multiples of the full-range scale that a clip search over ``ratios`` tries."""
        return ratios

    @property
    def has_zero(self) -> bool:
        """Whether a zero point of every block is stored."""
        return False

    @property
    def middle(self) -> int | None:
        """The zero point that is meant where none is stored; ``None`` for formats without zero points."""
        return None

    @property
    def has_exact_zero(self) -> bool:
        """Whether every entry of a block can be exactly 0."""
        return True

    @property
    def columns_alone(self) -> bool:
        """Whether a column of codes can be decoded without the others."""
        return True

    @property
    def scales(self) -> ScaleFormat:
        """Storage of the scales."""
        return scale_format(self.scale)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes to bytes along the last axis (`tnc.formats.pack`)."""
        return pack(codes, int(self.code_bits))

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """Inverse of `pack`: uint8 codes."""
        return unpack(packed, int(self.code_bits), count)

    def packed_length(self, count: int) -> int:
        """Bytes of ``count`` codes."""
        return packed_length(count, int(self.code_bits))

    def group_of(self, in_features: int) -> int:
        """Columns in a group for a weight with ``in_features`` columns.

        Raises:
            FormatError: if the group size does not divide ``in_features`` and padding was not asked for.
        """
        group = max(in_features, 1) if self.group_size is None else self.group_size
        if in_features % group and not self.pad and self.group_rows == 1:
            divisors = [d for d in range(1, in_features + 1) if in_features % d == 0 and d >= 8] or [in_features]
            raise FormatError(
                f"group_size={group} does not divide in_features={in_features}; "
                f"expected a divisor such as {', '.join(map(str, divisors[:8]))}, or None for one group a row. "
                "pad=True fills the last group with stored codes."
            )
        return group

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Blocks of a weight (out_features, in_features).

        Raises:
            FormatError: see `group_of`.
        """
        group = self.group_of(shape[1])
        rows = max(shape[0], 1) if self.group_rows is None else self.group_rows
        return Layout(shape, rows, group, shape[1] + (-shape[1] % group if self.pad else 0))

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a weight of this shape takes: codes, scales, zero points."""
        layout = self.layout(shape)
        down, across = layout.blocks
        zeros = down * self.packed_length(across) * 8 if self.has_zero else 0
        return shape[0] * self.packed_length(layout.stored) * 8 + zeros + self.scales.stored_bits((down, across))

    def spec(self) -> dict[str, Any]:
        """JSON-able description, from which `format_from_spec` rebuilds the format."""
        found = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}
        left_out = {f.name for f in fields(cast(Any, self)) if f.name in _OPTIONAL and found[f.name] == f.default}
        kept = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if k not in left_out}
        return {"type": self.type, **kept}


_OPTIONAL = ("scale", "pad", "group_rows", "path")  # fields younger than files of version 1
_FORMATS: dict[str, type[NumberFormat]] = {}
_FIELDS: dict[str, tuple[str, ...]] = {}  # torch.compile traces `format_from_spec`, but not dataclasses.fields
F = TypeVar("F", bound=type[NumberFormat])


def register_format(cls: F) -> F:
    """Make a kind of format known to `format_from_spec` under its ``type``; a type can be taken once."""
    if cls.type in _FORMATS:
        owner = _FORMATS[cls.type].__qualname__
        raise FormatError(f"number format type {cls.type!r} is already registered by {owner}; choose another.")
    _FORMATS[cls.type] = cls
    _FIELDS[cls.type] = tuple(f.name for f in fields(cast(Any, cls)))
    return cls


def format_from_spec(spec: Mapping[str, Any]) -> NumberFormat:
    """Inverse of `NumberFormat.spec`.

    Raises:
        FormatError: for an unknown type or field; lists the known ones.
    """
    cls = _FORMATS.get(spec.get("type", ""))
    if cls is None:
        raise FormatError(
            f"unknown number format type {spec.get('type')!r}; this version of tnc knows "
            f"{', '.join(sorted(_FORMATS))}. Upgrade tnc, or import the package that registers the type."
        )
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "type"}
    known = _FIELDS[cls.type]
    foreign = [k for k in given if k not in known]
    if foreign:
        raise FormatError(
            f"number format {cls.type!r} has no field {', '.join(foreign)}; this version of tnc knows "
            f"{', '.join(known)}. Upgrade tnc."
        )
    return cls(**given)


class WholeBits(NumberFormat):
    """Formats whose codes are all numbers of ``bits`` bits.

    Attributes:
        bits: of a code.
    """

    bits: int

    @property
    def code_bits(self) -> float:
        """``bits``."""
        return self.bits

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits
