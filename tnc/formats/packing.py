"""Bit packing: small unsigned codes to bytes along the last axis, and exactly back.

Eight codes of ``bits`` bits fill ``bits`` bytes, least significant code first; a row is padded with
zero codes to a whole number of bytes. 8-bit codes are stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.errors import FormatError


def packed_length(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes of ``bits`` bits into bytes along the last axis.

    Args:
        codes: (..., count) integers in ``[0, 2**bits)``.
        bits: 1 to 8.

    Returns:
        (..., ceil(count * bits / 8)) uint8.

    Raises:
        FormatError: if a code does not fit, or ``bits`` is not 1 to 8.
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise FormatError(
            f"pack(bits={bits}) got codes in [{int(codes.min())}, {int(codes.max())}]; "
            f"expected 0 <= code < {2**bits}. Clamp the codes or use more bits."
        )
    if bits == 8:
        return codes.to(torch.uint8)
    *batch, count = codes.shape
    groups = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % 8)).reshape(*batch, -(-count // 8), 8)
    word = (groups << _shifts(8, bits, codes.device)).sum(-1, keepdim=True)  # (..., count / 8, 1), 8 * bits bits
    packed = (word >> _shifts(bits, 8, codes.device)) & 0xFF  # (..., count / 8, bits)
    whole: Tensor = packed.flatten(-2)
    return whole[..., : packed_length(count, bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: (..., bytes) uint8 to (..., count) uint8 codes."""
    _check_bits(bits)
    if bits == 8:
        return packed[..., :count]
    *batch, length = packed.shape
    padded = torch.nn.functional.pad(packed.to(torch.int64), (0, -length % bits))
    groups = padded.reshape(*batch, -(-length // bits), bits)
    word = (groups << _shifts(bits, 8, packed.device)).sum(-1, keepdim=True)
    codes = (word >> _shifts(8, bits, packed.device)) & (2**bits - 1)
    whole: Tensor = codes.flatten(-2)
    return whole[..., :count].to(torch.uint8)


def _shifts(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device, dtype=torch.int64)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(f"bits={bits} cannot be packed; expected 1 to 8 bits a code.")


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack codes 0, 1, 2 five to a byte along the last axis: ``sum(code_i * 3**i)``, 1.6 bits a code.

    Args:
        codes: (..., count) integers in 0, 1, 2.

    Returns:
        (..., ceil(count / 5)) uint8, rows padded with zero codes.

    Raises:
        FormatError: if a code does not fit.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 2):
        raise FormatError(
            f"pack_ternary got codes in [{int(codes.min())}, {int(codes.max())}]; expected 0, 1 or 2. Clamp the codes."
        )
    *batch, count = codes.shape
    groups = torch.nn.functional.pad(codes.to(torch.int32), (0, -count % 5)).reshape(*batch, -(-count // 5), 5)
    packed: Tensor = (groups * _powers_of_three(codes.device)).sum(-1)
    return packed.to(torch.uint8)


def unpack_ternary(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_ternary`: (..., bytes) uint8 to (..., count) uint8 codes."""
    digits = packed.to(torch.int32).unsqueeze(-1) // _powers_of_three(packed.device) % 3
    whole: Tensor = digits.flatten(-2)
    return whole[..., :count].to(torch.uint8)


def _powers_of_three(device: torch.device) -> Tensor:
    return torch.tensor([1, 3, 9, 27, 81], device=device, dtype=torch.int32)
