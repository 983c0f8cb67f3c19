"""The ``qlr`` row: `Quantized`, alone or plus one `LowRank`, in one launch on a GPU."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from tnc.kernels import base as bases
from tnc.kernels.base import Base
from tnc.kernels.launch import unsuited
from tnc.kernels.lookup import level_tensor
from tnc.kernels.q_plus_lr import q_plus_lr
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import TALL_RANK, TALL_TOKENS, TILE_TOKENS, VECTOR_TOKENS, qlr, together
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.kernels.tuned import predicted
from tnc.terms import Expression, Product, Quantized, Spec, from_spec

_WORDS = ("low", "high", "groups", "gain")
_FACTORS = ("left", "right")


@dataclass(frozen=True)
class QLR:
    """The kernel bound to an operator; it reads the codes repacked (`pack`), L and R as they are.

    L and R that are quantized themselves are written out once, by `pack`, in the 16-bit dtype of their scales, and
    held beside their codes: decoding them in every launch would save bytes only where the rank is large.

    Attributes:
        base: how the quantized term is held.
        prefix: of the quantized term's tensor names in the operator.
        factors: prefix of the low-rank term's names; ``None`` without one.
        product: spec of a low-rank term with quantized factors; ``None`` for stored L and R.
        rows, rank: sizes beside the base's columns.
    """

    base: Base
    prefix: str
    factors: str | None
    product: Spec | None = None
    rows: int = 0
    rank: int = 0

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Words in the place of codes, scale and zero; the other tensors as they are."""
        replaced = self._replaced()
        kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
        packed = kept | self.base.pack(_inner(tensors, self.prefix))
        level_tensor(self.base.table, packed["low"].device)  # made here, outside of any graph capture
        if self.product is not None and self.factors is not None:
            packed |= _written_out(self.product, _inner(tensors, self.factors))
        return packed

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`: the tensors of the operator, bit for bit."""
        words = {name: tensors[name] for name in _WORDS if name in tensors}
        term = self.base.unpack(words, _inner(tensors, self.prefix))
        added = {*words, *(_FACTORS if self.product is not None else ())}
        kept = {name: tensor for name, tensor in tensors.items() if name not in added}
        return {self.prefix + name: tensor for name, tensor in term.items() if self.prefix + name not in kept} | kept

    def packed(self, tensors: Tensors) -> Packed:
        """What a launch reads; ``tensors`` as `pack` gives them."""
        low, base = tensors["low"], self.base
        if self.factors is None:
            scales = tensors["groups"]
            left, right = (scales.new_empty(shape, dtype=torch.bfloat16) for shape in
                           ((low.shape[1], 0), (0, base.columns)))  # fmt: skip
        else:
            left, right = (tensors[("" if self.product is not None else self.factors) + name] for name in _FACTORS)
        return Packed(low, tensors.get("high", low), tensors["groups"], left, right, base.bits, base.group, base.scale,
                      base.table, tensors.get("gain"))  # fmt: skip

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``; ``tensors`` as `pack` gives them."""
        p = self.packed(tensors)
        *batch, columns = x.shape
        rows = x.reshape(prod(batch), columns)
        left, right = (p.left, p.right) if self.factors is not None else (p.left.to(x.dtype), p.right.to(x.dtype))
        y: Tensor = qlr(rows, p.low, p.high, p.groups, left, right, p.gain, p.bits, p.group, p.scale, p.table)
        return y.reshape(*batch, y.shape[-1])

    def microseconds(self, tokens: int, device: torch.device) -> float | None:
        """Predicted time of the launch; ``None`` where the weight is rebuilt."""
        if device.type != "cuda" or not 0 < tokens <= TILE_TOKENS:
            return None
        sizes = {"rows": self.rows, "columns": self.base.columns, "rank": self.rank, "bits": self.base.bits}
        kernels = ["qlr_vector"] * (tokens <= VECTOR_TOKENS) + ["qlr_tile"] * (tokens > 1)
        times = [predicted(kernel, device, **sizes, tokens=tokens) for kernel in kernels]
        return min((time for time in times if time is not None), default=None)

    def alike(self, tensors: Tensors) -> Hashable:
        """Operators of one x for which this is equal can go in one launch; ``tensors`` as `pack` gives them."""
        return self.packed(tensors).alike

    def right(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What R is stored as."""
        if self.factors is None:
            return ()
        first = self.factors + ("right" if self.product is None else "1.")
        return tuple(tensor for name, tensor in tensors.items() if name.startswith(first))

    def joint(self, x: Tensor, others: Sequence[QLR], tensors: Sequence[Tensors]) -> list[Tensor] | None:
        """The answers of this operator and the ``others`` to x (tokens, in_features), where one launch gives them.

        R x is made once if all have the same R.
        """
        members = [each.packed(held) for each, held in zip((self, *others), tensors, strict=True)]
        rights = [each.right(held) for each, held in zip((self, *others), tensors, strict=True)]
        right = members[0].right.contiguous()
        same = all(len(a) == len(b) and all(s is t for s, t in zip(a, b, strict=True)) for a, b in pairwise(rights))
        members = [replace(p, left=p.left.contiguous(), right=right if same else p.right.contiguous()) for p in members]
        return together(x.contiguous(), members)

    def describe(self) -> str:
        """What runs, by tokens, and the size of what it reads."""
        low_rank = "" if self.factors is None else " + L (R x)"
        written = "" if self.product is None else ", L and R beside their codes, written out in 16 bits"
        return (
            f"up to {TILE_TOKENS} tokens ({TALL_TOKENS} to rank {TALL_RANK}): dequant(Q) x{low_rank} in one launch "
            f"(up to {VECTOR_TOKENS} by float32 FMA); more: the weight rebuilt once, then one multiplication; "
            f"Q held in {self.base.held_bits:.4g} bits a weight{written}"
        )

    def _replaced(self) -> set[str]:
        return {self.prefix + name for name in self.base.replaces}


def _inner(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _written_out(product: Spec, tensors: Tensors) -> dict[str, Tensor]:
    """L and R of a product of quantized factors in 16 bits: the dtype of their scales, else bfloat16."""
    term = from_spec(product, tensors)
    assert isinstance(term, Product), "refused before"
    written = {}
    for name, factor in zip(_FACTORS, term.terms, strict=True):
        assert isinstance(factor, Quantized), "refused before"
        wide = factor.to_dense()
        half = factor.scale.dtype == torch.float16 and bool(wide.abs().max() <= torch.finfo(torch.float16).max)
        written[name] = wide.to(torch.float16 if half else torch.bfloat16)
    return written


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    if 0 in operator.shape:
        return "the operator is empty"
    parts = q_plus_lr(operator)
    if parts is None:
        return "it runs a quantized term, alone or plus one low-rank term"
    if isinstance(parts.low_rank, Product) and 0 in parts.low_rank.terms[0].shape:
        return "its quantized factors have rank 0"
    return bases.refusal(parts.quantized)


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression) -> QLR:
    """The kernel for an operator that is not refused."""
    parts = q_plus_lr(operator)
    assert parts is not None, "refused before"
    product, rank = None, 0
    if isinstance(parts.low_rank, Product):
        product, rank = parts.low_rank.spec(), parts.low_rank.terms[0].shape[1]
    elif parts.low_rank is not None:
        rank = parts.low_rank.rank
    return QLR(Base.of(parts.quantized), parts.base, parts.factors, product, operator.shape[0], rank)


register_kernel(Kernel("qlr", _serves, bind, priority=50))
