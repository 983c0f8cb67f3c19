"""`Base`: how a quantized term is held for the fused kernels, in code words and group words, and exactly back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.formats import IntFormat, NumberFormat, TableFormat
from tnc.kernels.table import Tensors
from tnc.kernels.words import LOW_BITS, code_words, codes_of, group_words, groups_of, pair_words, pairs_of, unit_of
from tnc.terms import Quantized

_SCALES = {torch.float16: "half", torch.bfloat16: "brain"}
_REPLACED = ("codes", "scale", "zero", "outer")
_MOST_LEVEL, _LEAST_PEAK = 2.0**10, 2.0**-6  # a level times a scale of e4m3 stays in float16's normal range


@dataclass(frozen=True)
class Base:
    """A quantized term for the kernels: codes of 2, 3, 4 or 8 bits, a word a group, perhaps a factor for the whole.

    A group word is a 16-bit scale and an integer zero point (``half``, ``brain``), or for tables a float32 scale
    (``single``), or two bfloat16 scales of groups of 16 columns (``pair``); the second level of e4m3 scales is the
    factor. Codes of 5 and 6 bits are held in 8; double-quantized scales are multiplied out, and kept beside.

    Attributes:
        format: of the term.
        columns: in_features.
        dtype: of the stored scales.
    """

    format: NumberFormat
    columns: int
    dtype: torch.dtype

    @classmethod
    def of(cls, term: Quantized) -> Base:
        """For a term that `refusal` does not refuse; looks at shapes only."""
        return cls(term.format, term.in_features, term.scale.dtype)

    @property
    def bits(self) -> int:
        """Bits that a code takes in the words."""
        bits = (self.format.levels - 1).bit_length()
        return bits if bits in LOW_BITS else 8

    @property
    def table(self) -> str:
        """Levels as `tnc.kernels.lookup` takes them; empty for integers."""
        if not isinstance(self.format, TableFormat):
            return ""
        return self.format.table if isinstance(self.format.table, str) else ",".join(map(repr, self.format.table))

    @property
    def scale(self) -> str:
        """What a group word holds."""
        if not self.table:
            return _SCALES[self.dtype]
        return "pair" if self._group() == 16 else "single"

    @property
    def group(self) -> int:
        """Columns of a group word, a whole number of units where one group is the row."""
        unit = unit_of(self.bits)
        return max(-(-self.columns // unit) * unit if self._group() == self.columns else self._group(), 32)

    @property
    def held_bits(self) -> float:
        """Bits a weight in the kernels' layout."""
        kept = 8 if self.format.scale == "uint8" else 0
        return self.bits + 32 / self.group + kept / self._group()

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Words ``low``, ``groups`` and, where there are some, ``high``, ``gain`` and the kept scales."""
        term = self._term(tensors)
        planes = code_words(term.integer_codes(), self.bits)
        words = {"low": planes[0], "groups": self._group_words(term)}
        if len(planes) == 2:
            words["high"] = planes[1]
        if self.format.scale == "e4m3" and term.outer is not None:
            words["gain"] = term.outer
        return words

    def unpack(self, words: Tensors, kept: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`: the term's tensors, bit for bit; ``kept`` are those that `keeps` names."""
        planes = tuple(words[name] for name in ("low", "high") if name in words)
        codes = codes_of(planes, self.bits, self.columns)
        scale, zero, outer = self._scales(words, kept)
        return Quantized.from_codes(codes, scale, zero, self.format, outer).tensors()

    @property
    def keeps(self) -> tuple[str, ...]:
        """Names of the term's tensors that stay beside the words: none of them could be computed back."""
        return ("scale", "outer") if self.format.scale == "uint8" else ()

    @property
    def replaces(self) -> tuple[str, ...]:
        """Names of the term's tensors that the words stand for."""
        return tuple(name for name in _REPLACED if name not in self.keeps)

    def _term(self, tensors: Tensors) -> Quantized:
        codes, scale, zero, outer = (tensors.get(name) for name in _REPLACED)
        assert codes is not None and scale is not None, "the operator that was bound has them"
        return Quantized(codes, scale, zero, self.format, self.columns, outer)

    def _group(self) -> int:
        return self.format.group_of(self.columns)

    def _group_words(self, term: Quantized) -> Tensor:
        if self.scale in ("half", "brain"):
            return group_words(term.scale, term.zeros())
        if self.format.scale == "e4m3":
            scale = term.scale.view(torch.float8_e4m3fn).to(torch.float32)
            return pair_words(scale) if self.scale == "pair" else _patterns(scale)
        if self.format.scale == "e8m0":  # a byte is the exponent; its 0 is 2**-127, below the normal numbers
            wide = term.scale.to(torch.int32)
            return torch.where(wide == 0, 1 << 22, wide << 23).T.contiguous()
        return _patterns(term.scales(torch.float32))

    def _scales(self, words: Tensors, kept: Tensors) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Stored scale, zero points (rows, groups) and second level."""
        groups = words["groups"]
        if self.scale in ("half", "brain"):
            return *groups_of(groups, self.dtype), None
        if self.format.scale == "uint8":
            return kept["scale"], None, kept["outer"]
        if self.format.scale == "e8m0":
            return (groups.T.contiguous() >> 23).to(torch.uint8), None, None
        wide = pairs_of(groups) if self.scale == "pair" else groups.T.contiguous().view(torch.float32)
        if self.format.scale == "e4m3":
            return wide.to(torch.float8_e4m3fn).view(torch.uint8), None, words["gain"]
        return wide.to(self.dtype), None, None


def _patterns(scale: Tensor) -> Tensor:
    """Float32 scales (rows, groups) as int32 words (groups, rows)."""
    return scale.T.contiguous().view(torch.int32)


def refusal(term: Quantized) -> str | None:
    """Why the kernels cannot hold a quantized term, or ``None``."""
    format = term.format
    if not isinstance(format, (IntFormat, TableFormat)):
        return (
            f"it decodes codes that stand alone, not {type(format).__name__}, whose codes mean something only with "
            "those of the rows before"
        )
    if term.layout.rows != 1:
        return f"blocks of {term.layout.rows} rows share a scale; it takes groups within a row"
    if term.layout.stored != term.in_features:
        return "the rows are padded to whole groups"
    return _unheld(format, term.scale.dtype) or _ungrouped(Base.of(term))


def _unheld(format: IntFormat | TableFormat, dtype: torch.dtype) -> str | None:
    if isinstance(format, IntFormat):
        return None if dtype in _SCALES else f"scales are {dtype}; with integers it reads 16-bit scales"
    if format.levels > 16:
        return f"tables of {format.levels} levels do not fit its lookup of 16"
    peak = max(map(abs, format.values))
    if not _LEAST_PEAK <= peak <= _MOST_LEVEL:
        return f"the largest level {peak:.3g} is not between {_LEAST_PEAK:.3g} and {_MOST_LEVEL:.0f}"
    return None


def _ungrouped(base: Base) -> str | None:
    stored, unit = base.format.group_of(base.columns), unit_of(base.bits)
    if base.scale == "pair":
        fits = base.format.scale == "e4m3" and base.columns % 32 == 0 and base.bits != 3
        return None if fits else "groups of 16 columns are taken with e4m3 scales, 2 or 4 bits and whole words"
    group = base.group if stored == base.columns else stored
    step = 64 if base.bits == 3 else 32
    if group % step or (group > unit and group % unit) or (group < unit and unit % group):
        return f"groups of {group} columns do not fit its units of {unit}; it takes multiples of {step} that divide it"
    return None
