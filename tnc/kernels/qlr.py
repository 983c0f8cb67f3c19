"""The ``qlr`` row: `Quantized`, alone or plus one `LowRank`, in one launch on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tnc.formats import IntFormat
from tnc.kernels.launch import unsuited
from tnc.kernels.qlr_ops import TALL_RANK, TALL_TOKENS, TILE_TOKENS, VECTOR_TOKENS, qlr
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.kernels.words import LOW_BITS, code_words, codes_of, group_words, groups_of, unit_of
from tnc.terms import Expression, LowRank, Quantized, Sum

_SCALES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QLR:
    """The kernel bound to an operator; it reads the codes repacked (`pack`), L and R as they are.

    Attributes:
        format: of the quantized term.
        columns: in_features.
        scale: dtype of the scales.
        base: prefix of the quantized term's tensor names in the operator.
        factors: prefix of the low-rank term's names; ``None`` without one.
    """

    format: IntFormat
    columns: int
    scale: torch.dtype
    base: str
    factors: str | None

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Words in the place of codes, scale and zero; the other tensors as they are."""
        codes, scale, zero = (tensors.get(self.base + name) for name in ("codes", "scale", "zero"))
        assert codes is not None and scale is not None, "the operator that was bound has them"
        term = Quantized(codes, scale, zero, self.format, self.columns)
        planes = code_words(term.integer_codes(), self.format.bits)
        kept = {name: tensor for name, tensor in tensors.items() if name not in self._replaced()}
        words = {"low": planes[0], "groups": group_words(term.scale, term.zeros())}
        return kept | words | ({"high": planes[1]} if len(planes) == 2 else {})

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`: the tensors of the operator, bit for bit."""
        planes = tuple(tensors[name] for name in ("low", "high") if name in tensors)
        scale, zero = groups_of(tensors["groups"], self.scale)
        codes = codes_of(planes, self.format.bits, self.columns)
        term = Quantized.from_codes(codes, scale, zero, self.format)
        kept = {name: tensor for name, tensor in tensors.items() if name not in ("low", "high", "groups")}
        return {self.base + name: tensor for name, tensor in term.tensors().items()} | kept

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``; ``tensors`` as `pack` gives them."""
        low = tensors["low"]
        if self.factors is None:
            left, right = x.new_empty(low.shape[1], 0), x.new_empty(0, self.columns)
        else:
            left, right = tensors[self.factors + "left"], tensors[self.factors + "right"]
        *batch, columns = x.shape
        rows = x.reshape(prod(batch), columns)
        y: Tensor = qlr(rows, low, tensors.get("high", low), tensors["groups"], left, right, self.format.bits,
                _group(self.format, columns), self.scale == torch.float16)  # fmt: skip
        return y.reshape(*batch, y.shape[-1])

    def describe(self) -> str:
        """What runs, by tokens."""
        low_rank = "" if self.factors is None else " + L (R x)"
        return (
            f"up to {TILE_TOKENS} tokens ({TALL_TOKENS} to rank {TALL_RANK}): dequant(Q) x{low_rank} in one launch "
            f"(up to {VECTOR_TOKENS} by float32 FMA); more: the weight rebuilt once, then one multiplication"
        )

    def _replaced(self) -> set[str]:
        return {self.base + name for name in ("codes", "scale", "zero")}


def _group(format: IntFormat, columns: int) -> int:
    """Columns in a group, a whole number of units where one group is the row."""
    unit = unit_of(format.bits)
    return -(-columns // unit) * unit if format.group_size in (None, columns) else format.group_of(columns)


def _parts(operator: Expression) -> tuple[Quantized, LowRank | None, str, str | None] | None:
    """Quantized term, low-rank term, and the prefixes of their names; ``None`` for other operators."""
    if isinstance(operator, Quantized):
        return operator, None, "", None
    if not isinstance(operator, Sum) or len(operator.terms) != 2:
        return None
    for base, factors in ((0, 1), (1, 0)):
        quantized, low_rank = operator.terms[base], operator.terms[factors]
        if isinstance(quantized, Quantized) and isinstance(low_rank, LowRank):
            return quantized, low_rank, f"{base}.", f"{factors}."
    return None


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    parts = _parts(operator)
    if parts is None:
        return "it runs a quantized term, alone or plus one low-rank term"
    quantized = parts[0]
    if not isinstance(quantized.format, IntFormat):
        return f"it decodes integer formats, not {type(quantized.format).__name__}"
    if quantized.format.bits not in LOW_BITS:
        return f"it decodes 2, 3, 4 and 8 bits, not {quantized.format.bits}"
    if quantized.layout.stored != quantized.in_features:
        return "the rows are padded to whole groups"
    step = 64 if quantized.format.bits == 3 else 32
    group = _group(quantized.format, quantized.in_features)
    unit = unit_of(quantized.format.bits)
    if group % step or (group > unit and group % unit) or (group < unit and unit % group):
        return f"groups of {group} columns do not fit its units of {unit}; it takes multiples of {step} that divide it"
    if quantized.scale.dtype not in _SCALES:
        return f"scales are {quantized.scale.dtype}; it reads 16-bit scales"
    if 0 in quantized.shape:
        return "the operator is empty"
    return None


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression) -> QLR:
    """The kernel for an operator that is not refused."""
    parts = _parts(operator)
    assert parts is not None, "refused before"
    quantized, _, base, factors = parts
    assert isinstance(quantized.format, IntFormat), "refused before"
    return QLR(quantized.format, quantized.in_features, quantized.scale.dtype, base, factors)


register_kernel(Kernel("qlr", _serves, bind, priority=50))
