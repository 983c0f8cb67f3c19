"""The ``composed`` row: products with rotations, scalings and permutations, and sums, whose parts have kernels.

A product of transforms and operators that rows of the table serve runs factor by factor, the last first; a sum whose
terms rows serve adds their outputs. Each part is given to the best row for it, so what is fused or repacked inside
stays so: ``Q + L R`` between two rotations is a transform, one launch, a transform. Without this row ``einsum`` would
rebuild the quantized weight on every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from tnc.kernels.parts import CALL, Part, is_transform, leading, specs_of, taken_of, transform
from tnc.kernels.q_plus_lr import q_plus_lr
from tnc.kernels.table import (
    Changing,
    Kernel,
    Tensors,
    bound_by,
    refusal_of,
    register_kernel,
    row_of,
)
from tnc.terms import Expression, Product, Sum

NAME = "composed"
_PLAIN = ("einsum", "reference")  # what serves everything, and is no reason to compose
_SHOWN = (1, 16)  # tokens whose predicted times are described


@dataclass(frozen=True)
class Composed:
    """The kernel bound to an operator: its parts in turn (a product), or added (a sum).

    Attributes:
        parts: of a product the last factor first, which meets x first.
        added: whether the outputs are added.
        device: where it runs.
        taken: transforms that the part right behind them, the first that is none, makes in its launch.
    """

    parts: tuple[Part, ...]
    added: bool
    device: torch.device
    taken: int = 0

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Every part's layout; what no kernel repacks is the same tensor."""
        return {name: tensor for part in self.parts for name, tensor in part.pack(tensors).items()}

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`, bit for bit."""
        return {name: tensor for part in self.parts for name, tensor in part.unpack(tensors).items()}

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``; ``tensors`` as `pack` gives them."""
        *batch, columns = x.shape
        y = x.reshape(prod(batch), columns)
        if self.added:
            y = sum((part(y, tensors) for part in self.parts[1:]), start=self.parts[0](y, tensors))
        else:
            y = self._chained(y, tensors)
        return y.reshape(*batch, y.shape[-1])

    def _chained(self, x: Tensor, tensors: Tensors) -> Tensor:
        place = leading(self.parts) if self.taken else 0
        for part in self.parts[: place - self.taken]:
            x = part(x, tensors)
        if self.taken:
            transforms = taken_of(self.parts[place - self.taken : place], tensors)
            x = self._head().changed(x, transforms, self.parts[place].own(tensors))
        for part in self.parts[place + bool(self.taken) :]:
            x = part(x, tensors)
        return x

    def microseconds(self, tokens: int, device: torch.device) -> float | None:
        """Predicted time: the sum over the parts, and of a sum the additions."""
        times = [part.microseconds(tokens, device) for part in self.parts]
        inside = self._inside(tokens, device)
        if inside is not None:
            place = leading(self.parts)
            times[place - self.taken : place] = [inside]
        known = [time for time in times if time is not None]
        return sum(known) + CALL * (len(known) - 1) * self.added if len(known) == len(times) else None

    def describe(self) -> str:
        """The parts in order, and the predicted times where they are known."""
        shown = [part.describe() for part in self.parts]
        if self.taken:
            place, head = leading(self.parts), self._head()
            names = " and ".join([*shown[place - self.taken : place], shown[place]])
            most = head.most(specs_of(self.parts[place - self.taken : place]))
            shown[place - self.taken : place + 1] = [f"to {most} tokens in one launch {names}"]
        parts = (" + " if self.added else ", then ").join(shown)
        times = [(tokens, self.microseconds(tokens, self.device)) for tokens in _SHOWN]
        known = [f"{time:.1f} us for {tokens}" for tokens, time in times if time is not None]
        return f"{parts}; predicted {', '.join(known)} tokens" if known else parts

    def _head(self) -> Changing:
        """The kernel that makes the transforms ahead of it."""
        head = self.parts[leading(self.parts)].kernel
        assert isinstance(head, Changing), "seen when it was bound"
        return head

    def _inside(self, tokens: int, device: torch.device) -> float | None:
        """Predicted time that transforms add to the launch that makes them; ``None`` where none does."""
        if not self.taken:
            return None
        place = leading(self.parts)
        return self._head().changing(specs_of(self.parts[place - self.taken : place]), tokens, device)


@dataclass(frozen=True)
class Piece:
    """A part before its kernel is bound, and the term that it runs."""

    row: str
    term: Expression
    names: tuple[tuple[str, str], ...]

    def bound(self, device: torch.device, dtype: torch.dtype) -> Part:
        """The part."""
        return Part(self.row, bound_by(self.row, self.term, device, dtype), self.names)


def parts_of(operator: Expression, device: torch.device, dtype: torch.dtype) -> tuple[Part | Piece, ...] | str:
    """The parts of an operator that this row serves, or why it does not. Binds no kernel, which may plan at length."""
    if not isinstance(operator, Product | Sum) or len(operator.terms) < 2:
        return "it runs products and sums of several terms"
    walk = _factors(operator, device, dtype) if isinstance(operator, Product) else _summands(operator, device, dtype)
    found: list[Part | Piece | str] = list(walk)
    refused = next((part for part in found if isinstance(part, str)), None)
    if refused is not None:
        return refused
    parts = tuple(part for part in found if not isinstance(part, str))
    rows = {part.row for part in parts} - {"transform", *_PLAIN}
    if not rows:
        return "none of its parts has a kernel of its own here"
    alone = next(iter(rows))
    if len(rows) == 1 and alone != NAME and refusal_of(alone, operator, device, dtype) is None:
        return f"{alone} runs all of it"
    return parts


def _factors(operator: Product, device: torch.device, dtype: torch.dtype) -> Iterator[Part | Piece | str]:
    """Factors of a product, the last first; each is a transform or has a row of its own."""
    for i, term in reversed(tuple(enumerate(operator.terms))):
        if is_transform(term):
            yield transform(term, f"{i}.")
            continue
        part = _piece(term, (("", f"{i}."),), device, dtype)
        yield f"its factor {i} ({term.kind}) has no kernel of its own here" if part.row in _PLAIN else part


def _summands(operator: Sum, device: torch.device, dtype: torch.dtype) -> Iterator[Piece]:
    """Terms of a sum: a quantized and a low-rank one together where a row takes both, those left over by einsum."""
    left = dict(enumerate(operator.terms))
    for i, j in combinations(left, 2) if len(left) > 2 else ():
        pair = Sum((operator.terms[i], operator.terms[j]))
        if i in left and j in left and q_plus_lr(pair) is not None:
            both = _piece(pair, (("0.", f"{i}."), ("1.", f"{j}."), ("", f"{i}_{j}.")), device, dtype)
            if both.row not in (*_PLAIN, NAME):
                del left[i], left[j]
                yield both
    plain: list[int] = []
    for i, term in left.items():
        part = _piece(term, (("", f"{i}."),), device, dtype)
        if part.row in _PLAIN:
            plain.append(i)
        else:
            yield part
    if 0 < len(plain) < len(operator.terms):
        names = tuple((f"{k}.", f"{i}.") for k, i in enumerate(plain))
        yield _piece(Sum(tuple(left[i] for i in plain)), names, device, dtype)


def _piece(term: Expression, names: tuple[tuple[str, str], ...], device: torch.device, dtype: torch.dtype) -> Piece:
    return Piece(row_of(term, device, dtype), term, names)


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    found = parts_of(operator, device, dtype)
    return found if isinstance(found, str) else None


def bind(operator: Expression, device: torch.device, dtype: torch.dtype) -> Composed:
    """The kernel for an operator that is not refused."""
    parts = parts_of(operator, device, dtype)
    assert not isinstance(parts, str), parts
    bound = tuple(part if isinstance(part, Part) else part.bound(device, dtype) for part in parts)
    if isinstance(operator, Sum):
        return Composed(bound, True, device)
    count = leading(bound)
    head = bound[count].kernel
    taken = head.takes(specs_of(bound[:count])) if isinstance(head, Changing) else 0
    return Composed(bound, False, device, taken)


register_kernel(Kernel(NAME, _serves, bind, priority=30, delegates=True))
