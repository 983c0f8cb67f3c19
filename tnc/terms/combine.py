"""`Sum` and `Product`: the two combinators, flat and n-ary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms.base import Expression, Spec, from_spec, register


@dataclass(frozen=True, eq=False)
class _Combinator(Expression):
    terms: tuple[Expression, ...]

    def __post_init__(self) -> None:
        nested = (t.terms if type(t) is type(self) else (t,) for t in self.terms)
        object.__setattr__(self, "terms", tuple(term for group in nested for term in group))
        if not self.terms:
            raise ShapeError(f"{type(self).__name__} of no terms has no shape; pass at least one term.")
        self._check_shapes()

    def _check_shapes(self) -> None:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of every child, named ``<index>.<name>``."""
        return prefixed_tensors(self.terms)

    def spec(self) -> Spec:
        """Kind, shape and the children's descriptions."""
        return {"kind": self.kind, "shape": list(self.shape), "terms": [t.spec() for t in self.terms]}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Expression:
        """Inverse of (`spec`, `tensors`)."""
        return cls(tuple(from_spec(child, child_tensors(i, tensors)) for i, child in enumerate(spec["terms"])))


def prefixed_tensors(terms: tuple[Expression, ...]) -> dict[str, Tensor]:
    """Tensors of the children of a combinator, named ``<index>.<name>``."""
    return {f"{i}.{k}": t for i, term in enumerate(terms) for k, t in term.tensors().items()}


def child_tensors(index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of `prefixed_tensors` those of child ``index``, under its own names."""
    prefix = f"{index}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


@register
@dataclass(frozen=True, eq=False)
class Sum(_Combinator):
    """``terms[0] + terms[1] + ...``, all of one shape; nested sums are flattened."""

    kind: ClassVar[str] = "sum"

    def _check_shapes(self) -> None:
        if len({t.shape for t in self.terms}) > 1:
            raise ShapeError(f"Sum got shapes {[t.shape for t in self.terms]}; expected one shape for all terms.")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.terms[0].shape

    def to_dense(self) -> Tensor:
        """Sum of the terms' matrices, at least float32."""
        return sum((t.to_dense() for t in self.terms[1:]), start=self.terms[0].to_dense())

    def linear(self, x: Tensor) -> Tensor:
        """Sum of the terms' outputs."""
        return sum((t.linear(x) for t in self.terms[1:]), start=self.terms[0].linear(x))


@register
@dataclass(frozen=True, eq=False)
class Product(_Combinator):
    """``terms[0] @ terms[1] @ ...`` with matching inner sizes; nested products are flattened."""

    kind: ClassVar[str] = "product"

    def _check_shapes(self) -> None:
        for a, b in zip(self.terms, self.terms[1:], strict=False):
            if a.shape[1] != b.shape[0]:
                raise ShapeError(
                    f"Product got shapes {[t.shape for t in self.terms]}; expected each in_features to equal the "
                    "next out_features."
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features of the first, in_features of the last)."""
        return self.terms[0].shape[0], self.terms[-1].shape[1]

    def to_dense(self) -> Tensor:
        """Product of the terms' matrices, at least float32."""
        result = self.terms[-1].to_dense()
        for term in reversed(self.terms[:-1]):
            left = term.to_dense()
            dtype = torch.promote_types(left.dtype, result.dtype)
            result = left.to(dtype) @ result.to(dtype)
        return result

    def linear(self, x: Tensor) -> Tensor:
        """The terms applied one after another, the last first."""
        for term in reversed(self.terms):
            x = term.linear(x)
        return x
