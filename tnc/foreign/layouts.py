"""How each tool lays a quantized layer out: one reader a layout, from its tensors to a term."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tnc.errors import CheckpointError
from tnc.foreign.words import affine, unpack_words
from tnc.formats import TABLES, TableFormat, unpack
from tnc.terms import Expression, Quantized

Config = Mapping[str, Any]
Reader = Callable[[Mapping[str, Tensor], Config], Expression]

# Nibble i of an AWQ word belongs to column _AWQ_ORDER[i] of its eight (AutoAWQ, GEMM layout).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GPTQ_BITS = (2, 3, 4, 8)
_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


def read_gptq(tensors: Mapping[str, Tensor], config: Config) -> Expression:
    """AutoGPTQ and GPTQModel: words along the inputs, zeros stored minus one in format ``gptq``, as they are in v2.

    Args:
        tensors: ``qweight`` (in * bits / 32, out), ``qzeros`` (groups, out * bits / 32), ``scales`` (groups, out)
            and ``g_idx`` (in,).
        config: ``bits``; ``checkpoint_format`` ``"gptq"`` or ``"gptq_v2"``.
    """
    bits, scales = int(config["bits"]), tensors["scales"]
    if bits not in _GPTQ_BITS:
        raise CheckpointError(f"GPTQ with {bits} bits is not known; expected one of {', '.join(map(str, _GPTQ_BITS))}.")
    columns = tensors["qweight"].shape[0] * 32 // bits
    codes = unpack_words(tensors["qweight"].T, bits, columns)
    zero = _gptq_zeros(tensors["qzeros"], bits, scales.shape[1], minus_one=config.get("checkpoint_format") != "gptq_v2")
    return affine(codes, scales.T, zero.T, bits, tensors.get("g_idx"))


def _gptq_zeros(words: Tensor, bits: int, count: int, *, minus_one: bool) -> Tensor:
    """(groups, out) zero points.

    Format 1 was written by subtracting one from every code of a word at once, with borrows between them, so the
    ones are added back to the word; 3-bit codes cross words and wrap one by one.
    """
    if minus_one and 32 % bits == 0:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = ((words.long() + ones) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
    zero = unpack_words(words, bits, count)
    return (zero + 1) & ((1 << bits) - 1) if minus_one and 32 % bits else zero


def read_awq(tensors: Mapping[str, Tensor], config: Config) -> Expression:
    """AutoAWQ and GPTQModel, GEMM layout: words along the outputs, nibbles of 4 bits interleaved, zeros as they are.

    Args:
        tensors: ``qweight`` (in, words), ``qzeros`` (groups, words), ``scales`` (groups, out).
        config: ``bits``; ``version`` ``"gemm"``.
    """
    version, bits = str(config.get("version", "gemm")).lower(), int(config.get("bits", config.get("w_bit", 4)))
    if version != "gemm":
        raise CheckpointError(f"AWQ layout {version!r} is not known; expected 'gemm'. Save the model in that layout.")
    scale = tensors["scales"]
    codes, zero = (_awq_codes(tensors[name], bits, scale.shape[1]).T for name in ("qweight", "qzeros"))
    return affine(codes, scale.T, zero, bits)


def _awq_codes(words: Tensor, bits: int, count: int) -> Tensor:
    codes = unpack_words(words, bits, count)
    if bits != 4:
        return codes
    nibbles = codes.reshape(len(codes), -1, 8)
    columns = torch.empty_like(nibbles)
    columns[..., list(_AWQ_ORDER)] = nibbles
    return columns.flatten(1)


def read_pack_quantized(tensors: Mapping[str, Tensor], config: Config) -> Expression:
    """compressed-tensors ``pack-quantized``: words along the inputs, codes and zeros offset by half the range.

    Args:
        tensors: ``weight_packed`` (out, words), ``weight_scale`` (out, groups), ``weight_shape`` (2,), where
            asymmetric ``weight_zero_point`` (words along out, groups), with activation order ``weight_g_idx`` (in,).
        config: not used; the widths follow from the shapes.
    """
    rows, columns = (int(size) for size in tensors["weight_shape"])
    packed, scale = tensors["weight_packed"], tensors["weight_scale"].reshape(rows, -1)
    fitting = [bits for bits in range(2, 9) if -(-columns * bits // 32) == packed.shape[1]]
    if not fitting:
        raise CheckpointError(
            f"{packed.shape[1]} words a row for {columns} columns are no width of 2 to 8 bits; expected the layout "
            "pack-quantized. The folder is damaged."
        )
    bits, zero = fitting[0], tensors.get("weight_zero_point")
    zeros = None if zero is None else unpack_words(zero.T, bits, rows).T
    return affine(unpack_words(packed, bits, columns), scale, zeros, bits, tensors.get("weight_g_idx"))


def read_bitsandbytes(tensors: Mapping[str, Tensor], config: Config) -> Expression:
    """Bitsandbytes 4-bit: two codes a byte, the first in the high bits, along the rows; largest entries of blocks.

    Args:
        tensors: ``weight`` packed uint8, ``weight.absmax`` (blocks,) float32 or, quantized a second time, uint8 with
            ``weight.nested_absmax`` and ``weight.nested_quant_map``; ``weight.quant_map`` (16,); the state in JSON.
            Scales that were quantized a second time are kept as the float32 numbers that they stand for.
        config: not used; the state says it all.
    """
    state = json.loads(bytes(tensors[_NF4_STATE].tolist()).decode())
    (rows, columns), block = (int(size) for size in state["shape"]), int(state["blocksize"])
    if columns % block:
        raise CheckpointError(
            f"blocks of {block} do not divide rows of {columns}, so scales cross rows; expected a width they divide. "
            "Quantize with a smaller blocksize."
        )
    pairs = unpack(tensors["weight"].reshape(1, -1), 4, rows * columns).reshape(-1, 2)
    scale = tensors["weight.absmax"]
    if scale.dtype == torch.uint8:
        outer = tensors["weight.nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))[: len(scale)]
        scale = tensors["weight.nested_quant_map"][scale.long()] * outer + state["nested_offset"]
    levels = tuple(tensors["weight.quant_map"].tolist())
    published = torch.tensor(TABLES["nf4"]).tolist()
    format = TableFormat("nf4" if list(levels) == published else levels, block, scale="float32")
    return Quantized.from_codes(pairs.flip(1).reshape(rows, columns), scale.float().reshape(rows, -1), None, format)


# suffixes that make a layer one of this layout -> the suffixes it may have, and its reader
READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Reader]] = {
    "gptq": (("qweight", "qzeros", "scales"), ("g_idx",), read_gptq),
    "awq": (("qweight", "qzeros", "scales"), (), read_awq),
    "compressed-tensors": (
        ("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx"), read_pack_quantized,
    ),
    "bitsandbytes": (
        (_NF4_STATE, "weight", "weight.absmax", "weight.quant_map"),
        ("weight.nested_absmax", "weight.nested_quant_map"), read_bitsandbytes,
    ),
}  # fmt: skip
