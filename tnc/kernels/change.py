"""What happens to x ahead of a multiplication: entries gathered, then scaled, then rotated, each if it is there.

A launch of ``qlr`` does it itself for few tokens (`tnc.kernels.change_kernels`); `Change.apply` does it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

import torch
from torch import Tensor

from tnc.kernels.hadamard import hadamard, rotating, sides
from tnc.kernels.table import Tensors
from tnc.terms import Spec

COUNTERS = 256  # of an announcement (`tnc.kernels.decode.announce`)
# Microseconds on one H200 (docs/kernels.md): made as x is read; gathered or scaled first; rotated first, and for each
# row of the larger side above 64.
_READ, _MADE, _TURNED, _SIDE = 0.4, 1.5, 1.8, 0.04
_MOST = 128  # rows of a rotation's left side: a program holds 64 columns of that matrix of signs
_ENTRIES = 1024  # of a token that a program gathers


@dataclass(frozen=True)
class Change:
    """``x -> rotation(factor * x[order])``.

    Attributes:
        order: (columns,) integers: a permutation or a selection of the entries of x.
        factor: (columns,).
        signs: of a rotation (`tnc.terms.Hadamard`), with its ``factors`` and whether it is the ``inverse``.
        apart: whether R sees x as it is.
    """

    order: Tensor | None = None
    factor: Tensor | None = None
    signs: Tensor | None = None
    factors: tuple[int, ...] = ()
    inverse: bool = False
    apart: bool = False

    @property
    def rotation(self) -> tuple[int, ...] | None:
        """The factors of the rotation, if it is one and no more."""
        return self.factors if self.signs is not None and self.order is None and self.factor is None else None

    def apply(self, x: Tensor) -> Tensor:
        """The changed x (tokens, columns), in the dtype of x."""
        if self.order is not None:
            x = x.index_select(-1, self.order.long())
        if self.factor is not None:
            x = x * self.factor.to(x.dtype)
        if self.signs is not None:
            x = hadamard(x, self.signs, self.factors, self.inverse)
        return x

    def adjoint(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of the factor, of that of the changed x."""
        if self.signs is not None:
            grad = hadamard(grad.contiguous(), self.signs, self.factors, not self.inverse)
        to_factor = None
        if self.factor is not None:
            seen = x if self.order is None else x.index_select(-1, self.order.long())
            to_factor = (grad * seen).sum(0).to(self.factor.dtype)
            grad = grad * self.factor.to(grad.dtype)
        if self.order is not None:
            grad = torch.zeros_like(x).index_add(-1, self.order.long(), grad)
        return grad, to_factor

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a launch can make it of x in a dtype: not float64, and no rotation with a large left side."""
        return dtype != torch.float64 and (self.signs is None or _small(self.factors))


@dataclass(frozen=True)
class Making:
    """A change as the device code takes it.

    Attributes:
        made: where the changed x goes, or x itself.
        tensors: order, factor, signs and the two matrices of signs, as far as they are there.
        form: (P, Q, inverse, padded P, columns a program, columns a step) of a rotation, or (0, entries a program).
        makers: programs that make it; none where it is made as x is read.
        unit: what a rotation is multiplied by.
    """

    made: Tensor
    tensors: tuple[Tensor | None, ...]
    form: tuple[int, ...]
    makers: int
    unit: float = 1.0


def making(x: Tensor, change: Change | None, columns: int, *, read: bool) -> Making:
    """How a launch changes x (tokens, in_features); ``read``: scalings as x is read.

    Gathers are made once: in every program they cost 4.8 us of 6.5 (H200, 4096 columns), a load of 32 places a warp.
    """
    if change is None:
        return Making(x, (None,) * 5, (0, 1), 0)
    kept = (change.order, change.factor)
    if change.signs is None:
        read = read and change.order is None
        shares = x.shape[0] * ceil(columns / _ENTRIES)
        return Making(x if read else x.new_empty(x.shape[0], columns), (*kept, None, None, None), (0, _ENTRIES),
                      0 if read else shares)  # fmt: skip
    how = rotating(x, columns, change.factors, change.inverse)
    made = x.new_empty(x.shape[0], columns)
    return Making(made, (*kept, change.signs, *how.matrices), how.form, x.shape[0] * how.blocks * how.parts, how.unit)


def _small(factors: tuple[int, ...]) -> bool:
    found = sides(factors)
    return found is not None and prod(found[0]) <= _MOST


def change_of(transforms: Sequence[tuple[Spec, Tensors]], *, apart: bool = False) -> Change:
    """What transforms make of x, the first to meet x first; `changes` says which can be one."""
    change = Change(apart=apart)
    for spec, held in transforms:
        if spec["kind"] == "hadamard":
            change = replace(change, signs=held["signs"], factors=tuple(spec["factors"]), inverse=spec["transposed"])
        elif spec["kind"] == "diagonal":
            change = replace(change, factor=held["vector"])
        else:
            change = replace(change, order=held["indices"])
    return change


_PLACES = {"permutation": 0, "selection": 0, "diagonal": 1, "hadamard": 2}


def changes(specs: Sequence[Spec]) -> int:
    """How many of the last of these transforms, the first to meet x first, are one `Change`."""
    count, place = 0, len(_PLACES)
    for spec in reversed(specs):
        own = _PLACES[spec["kind"]]
        if own >= place or (own == 2 and not _small(tuple(spec["factors"]))):
            break
        count, place = count + 1, own
    return count


def added(specs: Sequence[Spec], tokens: int) -> float:
    """Microseconds that transforms add to a launch of few tokens."""
    rotation = next((spec for spec in specs if spec["kind"] == "hadamard"), None)
    if rotation is not None:
        larger = max(prod(side) for side in sides(tuple(rotation["factors"])) or ((),))
        return _TURNED + _SIDE * max(larger - 64, 0)
    return _MADE if tokens > 2 or any(spec["kind"] != "diagonal" for spec in specs) else _READ
