"""`Chain`: a matrix product operator whose cores are terms, such as quantized ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, from_spec, register
from tnc.terms.combine import child_tensors, prefixed_tensors
from tnc.terms.mpo import Mpo, check_features


@register
@dataclass(frozen=True, eq=False)
class Chain(Expression):
    """Terms joined by bonds alone, where a `Product` joins them by all of their features.

    The matrix of term k is core k of an `Mpo`, ``(r_prev, o, i, r_next)`` as it lies in memory, as one row or cut into
    rows between two legs: a quantized core shares its scales along rows. A product of two terms is the chain with
    modes (m, 1) x (1, n).

    Attributes:
        terms: d >= 1 expressions (p, q), ``p q = r_prev o i r_next`` and p the product of the first 0 to 3 of these.
        ranks: d + 1 bond dimensions, 1 at both ends.
        out_modes: (o_1, ..., o_d).
        in_modes: (i_1, ..., i_d).
        features: (out_features, in_features) where the modes are padded; ``None`` is their product.

    Raises:
        ShapeError: if the terms do not fit the modes and bonds, or the features exceed the modes.
    """

    terms: tuple[Expression, ...]
    ranks: tuple[int, ...]
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    features: tuple[int, int] | None = None
    kind: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        d, modes = len(self.terms), (*self.out_modes, *self.in_modes)
        fits = len(self.out_modes) == len(self.in_modes) == len(self.ranks) - 1 == d > 0 and all(modes)
        if not fits or self.ranks[0] != 1 or self.ranks[-1] != 1 or not all(map(self._term_fits, range(d))):
            raise ShapeError(
                f"Chain over modes {self.out_modes} x {self.in_modes} and bonds {self.ranks} got terms of shapes "
                f"{[term.shape for term in self.terms]}; expected cores (r_prev, o, i, r_next) as one row or cut "
                "between two legs, and bond dimension 1 at both ends."
            )
        check_features("Chain", self.features, self.out_modes, self.in_modes)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), without padding."""
        return (prod(self.out_modes), prod(self.in_modes)) if self.features is None else self.features

    def core_shape(self, k: int) -> tuple[int, int, int, int]:
        """(r_prev, o, i, r_next) of core k."""
        return self.ranks[k], self.out_modes[k], self.in_modes[k], self.ranks[k + 1]

    def mpo(self) -> Mpo:
        """The operator with the terms' matrices as cores, at least float32."""
        cores = (term.to_dense().reshape(self.core_shape(k)) for k, term in enumerate(self.terms))
        return Mpo(tuple(cores), self.features)

    def to_dense(self) -> Tensor:
        """The matrix, at least float32."""
        return self.mpo().to_dense()

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T`` core by core; each core is rounded once to the dtype of ``x``."""
        return self.mpo().linear(x)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of every term, named ``<index>.<name>``."""
        return prefixed_tensors(self.terms)

    def spec(self) -> Spec:
        """Kind, shape, modes, bond dimensions and the terms' descriptions."""
        return {
            "kind": self.kind, "shape": list(self.shape), "out_modes": list(self.out_modes),
            "in_modes": list(self.in_modes), "ranks": list(self.ranks), "terms": [term.spec() for term in self.terms],
        }  # fmt: skip

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Chain:
        """Inverse of (`spec`, `tensors`)."""
        terms = tuple(from_spec(child, child_tensors(k, tensors)) for k, child in enumerate(spec["terms"]))
        rows, columns = spec["shape"]
        return cls(terms, tuple(spec["ranks"]), tuple(spec["out_modes"]), tuple(spec["in_modes"]), (rows, columns))

    def _term_fits(self, k: int) -> bool:
        legs = self.core_shape(k)
        return self.terms[k].shape in [(prod(legs[:cut]), prod(legs[cut:])) for cut in range(4)]
