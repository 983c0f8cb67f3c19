"""Codes, scales and zeros as 32-bit words in the order the kernels read them, and exactly back.

A unit is the columns of 16 words, 512/b for a plane of ``b`` bits (2, 4 or 8; 3-bit codes are a 2-bit and a 1-bit
plane). Its half words ``h = 0..31`` hold columns ``h, h + 32, h + 64, ...``, least significant first: one shift and
one mask give 32 neighbouring columns without a shuffle, two of them in each word as the tensor cores want them.
Units come first, so the words that neighbouring rows need at one time are contiguous: ``(units, rows, 16)``.

The 1-bit plane has 16 half words for the 32 of its 2-bit plane. Bit ``4 (c // 2) + 2 (h // 16) + c % 2`` of half word
``h % 16`` belongs to code ``c`` of half word ``h``: shifted, its bits fall on the nibbles that the 2-bit codes of
even or odd ``c`` are masked to.

Scale and zero of a group share a word: the 16 bits of the scale below, the zero above, ``(groups, rows)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = 16
LOW_BITS = {2: 2, 3: 2, 4: 4, 8: 8}  # bits of a code -> bits of its low plane


def unit_of(bits: int) -> int:
    """Columns in a unit."""
    return WORDS * 32 // LOW_BITS[bits]


def code_words(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes (rows, columns) as int32 planes (units, rows, 16) and, for 3 bits, (units, rows, 8); padded by zeros."""
    rows, columns = codes.shape
    low, device = LOW_BITS[bits], codes.device
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -columns % unit_of(bits)))
    spread = padded.reshape(rows, -1, 16 // low, 2 * WORDS).permute(1, 0, 3, 2)  # (units, rows, half word, code)
    words = _words(((spread & (2**low - 1)) << _places(low, device)).sum(-1))
    if bits != 3:
        return (words,)
    high = (spread >> low).reshape(-1, rows, 2, WORDS, 8) << _high_places(device)
    return words, _words(high.sum((2, 4)))


def codes_of(planes: tuple[Tensor, ...], bits: int, columns: int) -> Tensor:
    """Inverse of `code_words`: uint8 codes (rows, columns)."""
    low, device = LOW_BITS[bits], planes[0].device
    codes = (_halves(planes[0]).unsqueeze(-1) >> _places(low, device)) & (2**low - 1)
    if bits == 3:
        high = (_halves(planes[1])[:, :, None, :, None] >> _high_places(device)) & 1
        codes = codes | (high.reshape(codes.shape) << low)
    flat: Tensor = codes.permute(1, 0, 3, 2).reshape(codes.shape[1], -1)  # (rows, units * code * half word)
    return flat[:, :columns].to(torch.uint8)


def group_words(scale: Tensor, zeros: Tensor) -> Tensor:
    """16-bit scales and integer zeros (rows, groups) as int32 words (groups, rows)."""
    low = scale.view(torch.int16).to(torch.int64) & 0xFFFF
    return _signed(low | (zeros.to(torch.int64) << 16)).T.contiguous()


def groups_of(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of `group_words`: scales in ``dtype`` and uint8 zeros (rows, groups)."""
    flat = words.T.contiguous()
    scale = flat.to(torch.int16).view(dtype)  # keeps the low 16 bits
    return scale, (flat >> 16).to(torch.uint8)


def pair_words(scale: Tensor) -> Tensor:
    """Scales (rows, 2 n) that bfloat16 holds exactly, two neighbours a word, the first below: (n, rows)."""
    halves = scale.to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
    return _signed(halves[:, ::2] | (halves[:, 1::2] << 16)).T.contiguous()


def pairs_of(words: Tensor) -> Tensor:
    """Inverse of `pair_words`: float32 scales (rows, 2 n)."""
    flat = words.T.contiguous()
    both = torch.stack((flat << 16, flat & -65536), -1)
    return both.view(torch.float32).flatten(-2)


def _places(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 16, bits, device=device, dtype=torch.int64)


def _high_places(device: torch.device) -> Tensor:
    """Bit of the 1-bit plane's half word for (h // 16, h % 16, c)."""
    code = torch.arange(8, device=device, dtype=torch.int64)
    half = torch.arange(2, device=device, dtype=torch.int64)
    return (4 * (code // 2) + code % 2)[None, None, :] + 2 * half[:, None, None]


def _words(halves: Tensor) -> Tensor:
    """Pairs of neighbouring half words as int32, the first below."""
    pairs = halves.reshape(*halves.shape[:-1], -1, 2)
    return _signed(pairs[..., 0] | (pairs[..., 1] << 16))


def _halves(words: Tensor) -> Tensor:
    """Inverse of `_words`, as non-negative int64."""
    wide = words.to(torch.int64)
    return torch.stack((wide & 0xFFFF, (wide >> 16) & 0xFFFF), -1).flatten(-2)


def _signed(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
