"""`Mpo`: a matrix product operator (tensor-train matrix), a chain of four-legged cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear, pad

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class Mpo(Expression):
    """``W[(o_1..o_d), (i_1..i_d)] = core_1[0, o_1, i_1, :] @ ... @ core_d[:, o_d, i_d, 0]``, indices row-major.

    Cores are laid out as in TensorLy's ``TTMatrix``. Where the modes multiply to more than the features, the
    last rows and columns are padding: stored, counted in `storage_bits`, and never seen outside.

    Attributes:
        cores: d >= 1 tensors (r_prev, out, in, r_next), bond dimensions 1 at both ends; bond 0 is the zero matrix.
        features: (out_features, in_features); ``None`` is the product of the modes.
    """

    cores: tuple[Tensor, ...]
    features: tuple[int, int] | None = None
    kind: ClassVar[str] = "mpo"

    def __post_init__(self) -> None:
        shapes = [tuple(core.shape) for core in self.cores]
        flawed = not shapes or any(len(shape) != 4 for shape in shapes)
        if flawed or shapes[0][0] != 1 or shapes[-1][3] != 1 or not _bonds_fit(shapes):
            raise ShapeError(
                f"Mpo got cores of shapes {shapes}; expected (r_prev, out, in, r_next) with r_next equal to the next "
                "r_prev and bond dimension 1 at both ends."
            )
        check_features("Mpo", self.features, self.out_modes, self.in_modes)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), without padding."""
        return (prod(self.out_modes), prod(self.in_modes)) if self.features is None else self.features

    @property
    def out_modes(self) -> tuple[int, ...]:
        """(o_1, ..., o_d); their product is out_features plus padding."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def in_modes(self) -> tuple[int, ...]:
        """(i_1, ..., i_d); their product is in_features plus padding."""
        return tuple(core.shape[2] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The d + 1 bond dimensions, 1 at both ends."""
        return (1, *(core.shape[3] for core in self.cores))

    @property
    def params(self) -> int:
        """Numbers stored, padding included."""
        return sum(core.numel() for core in self.cores)

    @property
    def padded(self) -> bool:
        """Whether the modes multiply to more than the features."""
        return self.shape != (prod(self.out_modes), prod(self.in_modes))

    def to_dense(self) -> Tensor:
        """The matrix, at least float32: cores merged left to right, one permutation at the end."""
        dtype = wide(*self.cores)
        chain = self.cores[0].to(dtype).flatten(0, 2)  # (o_1 i_1, r_1)
        for core in self.cores[1:]:
            merged = chain @ core.to(dtype).flatten(1)
            chain = merged.reshape(len(chain) * core.shape[1] * core.shape[2], core.shape[3])
        d = len(self.cores)
        sites = chain.reshape([size for pair in zip(self.out_modes, self.in_modes, strict=True) for size in pair])
        order = [*range(0, 2 * d, 2), *range(1, 2 * d, 2)]
        matrix = sites.permute(order).reshape(prod(self.out_modes), prod(self.in_modes))
        return matrix[: self.shape[0], : self.shape[1]]

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T``, core by core from the last one: in this order no step permutes anything.

        The state before core k is (tokens, i_1 .. i_k, r_k, o_k+1 .. o_d), and the core as stored is the matrix
        ``(r_k-1 o_k, i_k r_k)`` that takes it to the next.
        """
        *batch, in_features = x.shape
        rows, outs = prod(batch), 1
        state = pad(x.reshape(rows, in_features), (0, prod(self.in_modes) - in_features))
        lead = rows * prod(self.in_modes)
        for core in reversed(self.cores):
            before, out, into, after = core.shape
            lead = lead // into
            matrix = core.to(x.dtype).reshape(before * out, into * after)
            if outs == 1:  # one product instead of a matrix-vector product a row, five times as long
                state = linear(state.reshape(lead, into * after), matrix)
            else:
                state = matrix @ state.reshape(lead, into * after, outs)  # (lead, r_prev o, outs)
            outs *= out
        y = state.reshape(*batch, outs)
        return y[..., : self.shape[0]]

    def tensors(self) -> dict[str, Tensor]:
        """``core0``, ``core1``, ..."""
        return {f"core{k}": core for k, core in enumerate(self.cores)}

    def spec(self) -> Spec:
        """Kind, shape, modes and bond dimensions."""
        return {
            "kind": self.kind, "shape": list(self.shape), "out_modes": list(self.out_modes),
            "in_modes": list(self.in_modes), "ranks": list(self.ranks),
        }  # fmt: skip

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Mpo:
        """Inverse of (`spec`, `tensors`)."""
        rows, columns = spec["shape"]
        return cls(tuple(tensors[f"core{k}"] for k in range(len(spec["out_modes"]))), (rows, columns))


def _bonds_fit(shapes: list[tuple[int, ...]]) -> bool:
    return all(a[3] == b[0] for a, b in pairwise(shapes))


def check_features(
    kind: str, features: tuple[int, int] | None, out_modes: tuple[int, ...], in_modes: tuple[int, ...]
) -> None:
    """Refuse features that the modes do not hold; ``None`` is all they hold.

    Raises:
        ShapeError: if one is less than 1 or above the product of its modes.
    """
    full = prod(out_modes), prod(in_modes)
    if features is not None and any(not 0 < f <= p for f, p in zip(features, full, strict=True)):
        raise ShapeError(
            f"{kind} of features {features} got modes {out_modes} x {in_modes} of a {full} matrix; expected features "
            "of at least 1 and at most the product of the modes."
        )
