"""The ``trellis`` row: a trellis-coded term of anti-diagonals, alone or plus one `LowRank`, in one launch on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tnc.formats import TrellisFormat
from tnc.kernels import trellis_words
from tnc.kernels.launch import unsuited
from tnc.kernels.q_plus_lr import q_plus_lr
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.kernels.trellis_launch import Coded
from tnc.kernels.trellis_ops import TILE_TOKENS, VECTOR_TOKENS, stream_of, trellis
from tnc.kernels.trellis_words import UNITS
from tnc.terms import Expression, LowRank, Quantized

_OWN = ("stream", "firsts", "items", "fixes", "steps")
_MOST_COLUMNS = 2**16  # that the words of fixes number


@dataclass(frozen=True)
class Trellis:
    """The kernel bound to an operator; it reads the codes repacked (`pack`), L and R as they are.

    Attributes:
        format: of the codes.
        rows, columns: of the weight.
        base: prefix of the quantized term's tensor names in the operator.
        factors: that of the low-rank term's; ``None`` without one.
    """

    format: TrellisFormat
    rows: int
    columns: int
    base: str
    factors: str | None

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Codes as `Stream` packs them; scales in float32, times a constant, beside those stored."""
        term = self._term(tensors)
        kept = {name: tensor for name, tensor in tensors.items() if name != self.base + "codes"}
        steps = (term.scales(torch.float64)[:, 0] * UNITS[self.format.code]).float()
        packed = stream_of(self.rows, self.columns, self.format).pack(term.integer_codes())
        return {**kept, **packed, "steps": steps}

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`: the tensors of the operator, bit for bit."""
        kept = {name: tensor for name, tensor in tensors.items() if name not in _OWN}
        codes = stream_of(self.rows, self.columns, self.format).codes(tensors["stream"])
        scale, outer = kept[self.base + "scale"], kept.get(self.base + "outer")
        return {self.base + "codes": Quantized.from_codes(codes, scale, None, self.format, outer).codes} | kept

    def coded(self, tensors: Tensors, dtype: torch.dtype) -> Coded:
        """What a launch reads; ``tensors`` as `pack` gives them, ``dtype`` of factors where there are none."""
        stream, firsts, items, fixes, steps = (tensors[name] for name in _OWN)
        if self.factors is None:
            left, right = steps.new_empty(self.rows, 0, dtype=dtype), steps.new_empty(0, self.columns, dtype=dtype)
        else:
            left, right = (tensors[self.factors + name] for name in ("left", "right"))
        format = self.format
        return Coded(stream, firsts, items, fixes, steps, left, right, format.bits, format.state_bits, format.length)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``; ``tensors`` as `pack` gives them."""
        *batch, columns = x.shape
        c = self.coded(tensors, x.dtype)
        rows = x.reshape(prod(batch), columns)
        y: Tensor = trellis(rows, c.stream, c.firsts, c.items, c.fixes, c.steps, c.left, c.right, c.bits, c.state_bits,
                            c.length)  # fmt: skip
        return y.reshape(*batch, y.shape[-1])

    def describe(self) -> str:
        """What runs, by tokens."""
        low_rank = "" if self.factors is None else " + L (R x)"
        return (
            f"up to {TILE_TOKENS} tokens: states decoded in registers{low_rank} in one launch (up to {VECTOR_TOKENS} "
            "by float32 FMA); more: the weight rebuilt once, then one multiplication"
        )

    def _term(self, tensors: Tensors) -> Quantized:
        codes, scale = (tensors[self.base + name] for name in ("codes", "scale"))
        return Quantized(codes, scale, None, self.format, self.columns, tensors.get(self.base + "outer"))


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    parts = q_plus_lr(operator)
    if parts is None or not isinstance(parts.quantized.format, TrellisFormat):
        return "it runs a trellis-coded term, alone or plus one low-rank term"
    if parts.factors is not None and not isinstance(parts.low_rank, LowRank):
        return "its factors are quantized"
    if 0 in operator.shape:
        return "the operator is empty"
    term, format = parts.quantized, parts.quantized.format
    if format.path != "diagonal" or format.code != "1mad":
        return f"it decodes anti-diagonals of the code 1mad, not {format.path}s of {format.code}"
    if term.scale.shape[-1] != 1:
        return f"a row has {term.scale.shape[-1]} scales; it takes one"
    if term.in_features > _MOST_COLUMNS:
        return f"{term.in_features} columns are more than {_MOST_COLUMNS}"
    return trellis_words.refusal(format)


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression) -> Trellis:
    """The kernel for an operator that is not refused."""
    parts = q_plus_lr(operator)
    assert parts is not None and isinstance(parts.quantized.format, TrellisFormat), "refused before"
    return Trellis(parts.quantized.format, *operator.shape, parts.base, parts.factors)


register_kernel(Kernel("trellis", _serves, bind, priority=50))
