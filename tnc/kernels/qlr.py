"""The ``qlr`` row: `Quantized`, alone or plus one `LowRank`, in one launch on a GPU."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from tnc.kernels import base as bases
from tnc.kernels.base import Base
from tnc.kernels.change import Change, added, change_of, changes
from tnc.kernels.launch import unsuited
from tnc.kernels.lookup import level_tensor
from tnc.kernels.q_plus_lr import QPlusLR, q_plus_lr
from tnc.kernels.qlr_change_ops import most, qlr_changed, together_changed
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import TALL_RANK, TALL_TOKENS, TILE_TOKENS, VECTOR_TOKENS, qlr, together
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.kernels.tuned import predicted
from tnc.terms import (
    Diagonal,
    Expression,
    Hadamard,
    LowRank,
    Permutation,
    Product,
    Quantized,
    Spec,
    Sum,
    from_spec,
)

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
        ahead: transforms of x that the quantized term alone sees, the first to meet x first, and their tensors' prefix.
    """

    base: Base
    prefix: str
    factors: str | None
    product: Spec | None = None
    rows: int = 0
    rank: int = 0
    ahead: tuple[tuple[Spec, str], ...] = field(default=(), hash=False)

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
        if self.ahead:
            change = change_of([(spec, _inner(tensors, name)) for spec, name in self.ahead], apart=True)
            return _changed(rows, change, p).reshape(*batch, -1)
        y: Tensor = qlr(rows, p.low, p.high, p.groups, *_factors(p, x), p.gain, p.bits, p.group, p.scale, p.table)
        return y.reshape(*batch, y.shape[-1])

    def most(self, specs: Sequence[Spec]) -> int:
        """Tokens up to which these transforms of x are made in the launch."""
        alone = [spec["kind"] for spec in specs] == ["hadamard"]
        return most(tuple(specs[0]["factors"]) if alone else None)

    def takes(self, specs: Sequence[Spec]) -> int:
        """How many of the last of these transforms, the first to meet x first, go into the launch."""
        count = 0 if self.ahead else changes(specs)
        return count if count and self.most(specs[len(specs) - count :]) else 0

    def changed(self, x: Tensor, transforms: Sequence[tuple[Spec, Tensors]], tensors: Tensors) -> Tensor:
        """The answer to the transformed x: (tokens, in_features) to (tokens, out_features)."""
        return _changed(x, change_of(transforms), self.packed(tensors))

    def changing(self, specs: Sequence[Spec], tokens: int, device: torch.device) -> float | None:
        """Predicted microseconds that these transforms add to the launch; ``None`` where they run before."""
        return added(specs, tokens) if device.type == "cuda" and 0 < tokens <= self.most(specs) else None

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
        return id(self) if self.ahead else self.packed(tensors).alike

    def right(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What R is stored as."""
        if self.factors is None:
            return ()
        first = self.factors + ("right" if self.product is None else "1.")
        return tuple(tensor for name, tensor in tensors.items() if name.startswith(first))

    def joint(
        self, x: Tensor, others: Sequence[QLR], tensors: Sequence[Tensors],
        transforms: Sequence[tuple[Spec, Tensors]] = (),
    ) -> list[Tensor] | None:  # fmt: skip
        """The answers of this operator and the ``others`` to x (tokens, in_features), where one launch gives them.

        R x is made once if all have the same R; ``transforms`` of x, the first to meet x first, in the launch too.
        """
        members = [each.packed(held) for each, held in zip((self, *others), tensors, strict=True)]
        rights = [each.right(held) for each, held in zip((self, *others), tensors, strict=True)]
        right = members[0].right.contiguous()
        same = all(len(a) == len(b) and all(s is t for s, t in zip(a, b, strict=True)) for a, b in pairwise(rights))
        members = [replace(p, left=p.left.contiguous(), right=right if same else p.right.contiguous()) for p in members]
        if transforms:
            return together_changed(x.contiguous(), change_of(transforms), members)
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


def _factors(packed: Packed, x: Tensor) -> tuple[Tensor, Tensor]:
    """L and R; empty ones in the dtype of x."""
    return (packed.left, packed.right) if packed.shape[2] else (packed.left.to(x.dtype), packed.right.to(x.dtype))


def _changed(x: Tensor, change: Change, p: Packed) -> Tensor:
    y: Tensor = qlr_changed(x, change.order, change.factor, change.signs, p.low, p.high, p.groups, *_factors(p, x),
                            p.gain, change.factors, change.inverse, change.apart, p.bits, p.group, p.scale,
                            p.table)  # fmt: skip
    return y


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
    parts = q_plus_lr(operator) or _apart(operator)
    if parts is None:
        return "it runs a quantized term, alone or plus one low-rank term"
    if isinstance(parts.low_rank, Product) and 0 in parts.low_rank.terms[0].shape:
        return "its quantized factors have rank 0"
    return bases.refusal(parts.quantized)


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression) -> QLR:
    """The kernel for an operator that is not refused."""
    parts = q_plus_lr(operator) or _apart(operator)
    assert parts is not None, "refused before"
    product, rank = None, 0
    if isinstance(parts.low_rank, Product):
        product, rank = parts.low_rank.spec(), parts.low_rank.terms[0].shape[1]
    elif parts.low_rank is not None:
        rank = parts.low_rank.rank
    ahead = () if q_plus_lr(operator) is not None else _ahead(operator, parts)
    return QLR(Base.of(parts.quantized), parts.base, parts.factors, product, operator.shape[0], rank, ahead)


def _apart(operator: Expression) -> QPlusLR | None:
    """The parts of ``Q T + L R`` whose transforms T, which Q alone sees, one launch can make; ``None`` for others."""
    if not isinstance(operator, Sum) or len(operator.terms) != 2:
        return None
    for base, factors in ((0, 1), (1, 0)):
        product, low_rank = operator.terms[base], operator.terms[factors]
        if not isinstance(product, Product) or not isinstance(low_rank, LowRank):
            continue
        first, *rest = product.terms
        square = all(isinstance(term, Diagonal | Hadamard | Permutation) for term in rest)
        if isinstance(first, Quantized) and rest and square and changes(_specs(rest)) == len(rest):
            return QPlusLR(first, f"{base}.0.", low_rank, f"{factors}.")
    return None


def _specs(terms: Sequence[Expression]) -> list[Spec]:
    """Specs of the factors of a product, the first to meet x first."""
    return [term.spec() for term in reversed(terms)]


def _ahead(operator: Expression, parts: QPlusLR) -> tuple[tuple[Spec, str], ...]:
    place = int(parts.base.partition(".")[0])
    product = operator.terms[place] if isinstance(operator, Sum) else operator
    assert isinstance(product, Product), "found before"
    rest = tuple(enumerate(product.terms))[1:]
    return tuple((term.spec(), f"{place}.{i}.") for i, term in reversed(rest))


register_kernel(Kernel("qlr", _serves, bind, priority=50))
