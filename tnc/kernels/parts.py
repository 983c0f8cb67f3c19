"""Pieces of an operator with the kernels that run them, and transforms: pieces that change the basis and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tnc.kernels.applied import Applied, is_applied
from tnc.kernels.applied import applied as applied_leaf
from tnc.kernels.table import Bound, Repacking, Tensors, Timed
from tnc.terms import Diagonal, Expression, Spec

# Microseconds on one H200 (docs/kernels.md): a small operation; of a rotation the launch, an entry of a row, and an
# operation of the two products of signs, within a half of the times measured at 4096 and 11008 features.
CALL, _TURN, _ENTRY, _FLOP = 4.4, 0.6, 2.4e-4, 1.4e-8


@dataclass(frozen=True)
class Part:
    """A piece of the operator with the kernel that runs it.

    Attributes:
        row: name of the kernel's row, or ``transform``.
        kernel: bound to the piece.
        names: (prefix in the piece, prefix in the whole) of its tensors; the first that fits counts.
    """

    row: str
    kernel: Bound
    names: tuple[tuple[str, str], ...]

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        return self.kernel(x, self.own(tensors))

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """The piece's tensors, of those of the whole, in the kernel's layout."""
        inner = self.own(tensors)
        return self._outer(self.kernel.pack(inner) if isinstance(self.kernel, Repacking) else inner)

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`."""
        inner = self.own(tensors)
        return self._outer(self.kernel.unpack(inner) if isinstance(self.kernel, Repacking) else inner)

    def microseconds(self, tokens: int, device: torch.device) -> float | None:
        """Predicted time on a GPU; ``None`` where nothing like it was measured."""
        if isinstance(self.kernel, Timed):
            return self.kernel.microseconds(tokens, device)
        if not isinstance(self.kernel, Applied) or device.type != "cuda":
            return None
        if self.kernel.spec["kind"] != "hadamard":
            return CALL
        size, block = self.kernel.spec["shape"][0], prod(self.kernel.spec["factors"])
        return float(_TURN + _ENTRY * size + _FLOP * tokens * 4 * size * block**0.5)

    def describe(self) -> str:
        """What runs."""
        return self.kernel.describe() if self.row == "transform" else f"{self.row} ({self.kernel.describe()})"

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The piece's tensors by their names in it, of those of the whole."""
        return {inner + name.removeprefix(outer): tensor for name, tensor in tensors.items()
                for inner, outer in self.names if name.startswith(outer)}  # fmt: skip

    def _outer(self, tensors: Tensors) -> dict[str, Tensor]:
        return {self._whole(name): tensor for name, tensor in tensors.items()}

    def _whole(self, name: str) -> str:
        """The name in the whole of a tensor of the piece."""
        inner, outer = next(pair for pair in self.names if name.startswith(pair[0]))
        return outer + name.removeprefix(inner)


def leading(parts: Sequence[Part]) -> int:
    """How many transforms stand before the first part that is none."""
    return next((i for i, part in enumerate(parts) if part.row != "transform"), len(parts))


def taken_of(parts: Sequence[Part], tensors: Tensors) -> list[tuple[Spec, Tensors]]:
    """Transforms as `tnc.kernels.table.Changing` takes them."""
    return [(spec, part.own(tensors)) for spec, part in zip(specs_of(parts), parts, strict=True)]


def specs_of(parts: Sequence[Part]) -> list[Spec]:
    """The specs of transforms."""
    leaves = [part.kernel for part in parts]
    return [leaf.spec for leaf in leaves if isinstance(leaf, Applied)]


def is_transform(term: Expression) -> bool:
    """Whether a factor changes the basis and no more: a rotation, scaling, permutation or selection."""
    return is_applied(term) or isinstance(term, Diagonal)


def transform(term: Expression, prefix: str) -> Part:
    """The part of such a factor; ``prefix`` is that of its tensors in the whole."""
    leaf = (
        Applied((("vector", "vector"),), term.spec(), 0.0) if isinstance(term, Diagonal) else applied_leaf(term, "", 1)
    )
    return Part("transform", leaf, (("", prefix),))
