"""Codes in 32-bit words, as other tools pack them, and the columns they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.errors import CheckpointError
from tnc.formats import IntFormat, unpack
from tnc.terms import Expression, Permutation, Product, Quantized


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` codes a row from int32 words: a little-endian stream of ``bits``-bit codes, also across words.

    GPTQ (2, 3, 4 and 8 bits) and compressed-tensors (1 to 8 bits) pack so.

    Args:
        words: (rows, words) int32.
        bits: of a code.
        count: codes a row.

    Returns:
        (rows, count) uint8.
    """
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] * 32 < count * bits:
        raise CheckpointError(
            f"packed codes are {words.dtype} {tuple(words.shape)}; expected int32 with at least {count * bits} bits a "
            f"row for {count} codes of {bits} bits. Check bits and group size in the folder's config."
        )
    return unpack(words.contiguous().view(torch.uint8), bits, count)


def affine(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_index: Tensor | None = None
) -> Expression:
    """``scale (code - zero)`` as a term; columns in activation order are put back by a permutation.

    Args:
        codes: (out_features, in_features) integers.
        scale: (out_features, groups) as stored.
        zero: (out_features, groups) integers in ``[0, 2**bits)``; ``None`` is mid-range.
        bits: of a code.
        group_index: (in_features,) group of each column; ``None`` where groups are runs of columns.

    Raises:
        CheckpointError: for a group index out of range, or groups of unequal size.
    """
    columns, groups = codes.shape[1], scale.shape[1]
    if groups == 0 or columns % groups:
        raise CheckpointError(
            f"{groups} groups do not divide {columns} columns; expected equal groups. The folder is padded or damaged."
        )
    size = columns // groups
    symmetric = zero is None or bool((zero == 1 << (bits - 1)).all())  # a constant zero point needs no storage
    format = IntFormat(bits, None if groups == 1 else size, symmetric)
    order = None if group_index is None else _order(group_index, groups, size)
    if order is None:
        return Quantized.from_codes(codes, scale.contiguous(), zero, format)
    return Product((Quantized.from_codes(codes[:, order], scale.contiguous(), zero, format), Permutation.of(order)))


def _order(group_index: Tensor, groups: int, size: int) -> Tensor | None:
    """Columns sorted by group; ``None`` where they are sorted already."""
    index = group_index.long().cpu()
    if index.numel() != groups * size or int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(
            f"act-order index of {index.numel()} columns runs from {int(index.min())} to {int(index.max())}; expected "
            f"{groups * size} columns with groups 0 to {groups - 1}. The folder is damaged, or of another group size."
        )
    if not bool((torch.bincount(index, minlength=groups) == size).all()):
        raise CheckpointError(
            f"act-order groups have {torch.bincount(index, minlength=groups).tolist()[:4]}... columns; expected {size} "
            "in each. The folder is damaged."
        )
    order = torch.argsort(index, stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order
