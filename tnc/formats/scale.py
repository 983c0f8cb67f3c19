"""How the scale of a block is stored: a float, a power of two, or 8 bits under a second float32 level."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import FormatError, all_finite

SUPERBLOCK = 256
"""Scales that share a second-level float32 under ``"uint8"`` (QLoRA, arXiv:2305.14314, section 3)."""

_E8M0_BIAS = 127


@dataclass(frozen=True)
class ScaleFormat(abc.ABC):
    """Storage of scales (block rows, groups); a scale of 0 belongs to a block of zeros.

    Attributes:
        name: as in `SCALES` and in files.
        bits: bits a stored scale.
    """

    name: str
    bits: int

    def outer(self, full: Tensor) -> Tensor | None:
        """Second-level float32 scales for the scales ``full``, or ``None`` where there is one level."""
        return None

    def outer_shape(self, blocks: tuple[int, int]) -> tuple[int, ...] | None:
        """Shape of the second level for that many scales, or ``None``."""
        return None

    def spread(self, outer: Tensor, blocks: tuple[int, int]) -> Tensor:
        """The second-level scale of every scale, (block rows, groups)."""
        raise NotImplementedError

    @abc.abstractmethod
    def store(self, scale: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Scales of at least 0 as stored, nonzero ones never as 0.

        Args:
            scale: any shape, float32 or float64.
            outer: second level of every scale, broadcastable, or ``None``.
            dtype: of the stored scales, from `dtype_for`.

        Raises:
            FormatError: if a scale is too large for the storage.
        """

    @abc.abstractmethod
    def load(self, stored: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Inverse of `store` up to its rounding: real scales in ``dtype``."""

    @abc.abstractmethod
    def dtype_for(self, full: Tensor) -> torch.dtype:
        """Dtype of stored scales for the scales ``full``."""

    def stored_bits(self, blocks: tuple[int, int]) -> int:
        """Bits of the scales of a matrix, second level included."""
        second = self.outer_shape(blocks)
        return blocks[0] * blocks[1] * self.bits + (32 * second[0] if second else 0)


@dataclass(frozen=True)
class FloatScale(ScaleFormat):
    """Scales in the first of ``dtypes`` whose normal range holds them all, else in the last."""

    dtypes: tuple[torch.dtype, ...]

    def dtype_for(self, full: Tensor) -> torch.dtype:
        """The first dtype that holds every nonzero scale as a normal number."""
        return next((d for d in self.dtypes if _is_normal(full, d)), self.dtypes[-1])

    def store(self, scale: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rounded to ``dtype``; what would be subnormal is raised to the smallest normal number."""
        smallest = torch.finfo(dtype).tiny
        rounded = torch.where(scale == 0, 0, scale.clamp_min(smallest)).to(dtype)
        _check_range(scale, all_finite(rounded), dtype)
        return rounded

    def load(self, stored: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The stored numbers."""
        return stored.to(dtype)


@dataclass(frozen=True)
class PowerOfTwoScale(ScaleFormat):
    """E8M0 of the OCP MX specification 1.0: the byte b is ``2 ** (b - 127)``; scales are rounded up.

    There is no 0: a block of zeros takes the byte 0, and its entries are the exact zeros of the table.
    """

    def dtype_for(self, full: Tensor) -> torch.dtype:
        """Bytes."""
        return torch.uint8

    def store(self, scale: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The least power of two that is not below the scale."""
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2 ** exponent, 0.5 <= mantissa < 1
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        _check_range(scale, not bool((exponent > _E8M0_BIAS).any()), torch.float32)
        return torch.where(scale == 0, 0, (exponent + _E8M0_BIAS).clamp(0, 2 * _E8M0_BIAS)).to(torch.uint8)

    def load(self, stored: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Powers of two."""
        return torch.ldexp(torch.ones_like(stored, dtype=dtype), stored.to(torch.int32) - _E8M0_BIAS)


@dataclass(frozen=True)
class Float8Scale(ScaleFormat):
    """Bytes of float8 e4m3 under one float32 scale of the whole matrix, as in NVFP4."""

    def outer(self, full: Tensor) -> Tensor | None:
        """The matrix's scale, (1,): the largest block scale takes e4m3's largest number."""
        largest = full.amax().reshape(1).to(torch.float32) / torch.finfo(torch.float8_e4m3fn).max
        _check_range(full, all_finite(largest), torch.float32)
        return largest

    def outer_shape(self, blocks: tuple[int, int]) -> tuple[int, ...] | None:
        """One for the matrix."""
        return (1,)

    def spread(self, outer: Tensor, blocks: tuple[int, int]) -> Tensor:
        """The matrix's scale for every block."""
        return outer.expand(blocks)

    def dtype_for(self, full: Tensor) -> torch.dtype:
        """Bytes."""
        return torch.uint8

    def store(self, scale: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Nearest e4m3 number, ties to even, as bytes."""
        assert outer is not None
        limits = torch.finfo(torch.float8_e4m3fn)
        ratio = (scale / _divisor(outer).to(scale.dtype)).clamp(limits.smallest_normal / 8, limits.max)
        return torch.where(scale == 0, 0, ratio).to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)

    def load(self, stored: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The two levels multiplied."""
        assert outer is not None
        return stored.view(torch.float8_e4m3fn).to(dtype) * outer.to(dtype)


@dataclass(frozen=True)
class Uint8Scale(ScaleFormat):
    """Double quantization: 8-bit codes 0..255 under a float32 for every 256 scales, taken row by row.

    QLoRA (arXiv:2305.14314, section 3) rounds to 8-bit floats after taking off the mean; steps here are even.
    """

    def outer(self, full: Tensor) -> Tensor | None:
        """The largest scale of every superblock over 255, (superblocks,)."""
        flat = full.flatten()
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % SUPERBLOCK)).reshape(-1, SUPERBLOCK)
        found = (padded.amax(-1) / 255).to(torch.float32)
        _check_range(full, all_finite(found), torch.float32)
        return found

    def outer_shape(self, blocks: tuple[int, int]) -> tuple[int, ...] | None:
        """One for every 256 scales."""
        return (-(-blocks[0] * blocks[1] // SUPERBLOCK),)

    def spread(self, outer: Tensor, blocks: tuple[int, int]) -> Tensor:
        """The superblock's scale for every block."""
        return outer.repeat_interleave(SUPERBLOCK)[: blocks[0] * blocks[1]].reshape(blocks)

    def dtype_for(self, full: Tensor) -> torch.dtype:
        """Bytes."""
        return torch.uint8

    def store(self, scale: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Nearest code, at least 1 unless the scale is 0."""
        assert outer is not None
        codes = torch.round(scale / _divisor(outer).to(scale.dtype)).clamp(1, 255)
        return torch.where(scale == 0, 0, codes).to(torch.uint8)

    def load(self, stored: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Code times second level."""
        assert outer is not None
        return stored.to(dtype) * outer.to(dtype)


SCALES: dict[str, ScaleFormat] = {
    scale.name: scale
    for scale in (
        FloatScale("half", 16, (torch.float16, torch.bfloat16)),
        FloatScale("bfloat16", 16, (torch.bfloat16,)),
        FloatScale("float32", 32, (torch.float32,)),
        PowerOfTwoScale("e8m0", 8),
        Float8Scale("e4m3", 8),
        Uint8Scale("uint8", 8),
    )
}
"""Every storage of scales by name. ``"half"`` is float16, or bfloat16 where float16's normal range is left."""


def scale_format(name: str) -> ScaleFormat:
    """The storage of scales called ``name``.

    Raises:
        FormatError: if there is none (lists them).
    """
    if name not in SCALES:
        raise FormatError(f"scale={name!r} is no storage of scales; expected one of {', '.join(SCALES)}.")
    return SCALES[name]


def _is_normal(scale: Tensor, dtype: torch.dtype) -> bool:
    limits = torch.finfo(dtype)
    return bool(((scale == 0) | ((scale >= limits.tiny) & (scale <= limits.max))).all())


def _check_range(scale: Tensor, fits: bool, dtype: torch.dtype) -> None:
    if not fits:
        name = str(dtype).removeprefix("torch.")
        raise FormatError(
            f"weight needs a scale of {float(scale.max()):.3g}, above the largest {name} "
            f"{torch.finfo(dtype).max:.3g}; divide the weight by a constant first."
        )


def _divisor(outer: Tensor) -> Tensor:
    return outer.masked_fill(outer == 0, torch.inf)
