"""The one interface of every expression, and the registry that rebuilds expressions from files.

An expression stands for a matrix ``(out_features, in_features)``. It is frozen data: the algorithms that
make it live in ``tnc.quant`` and ``tnc.decompose``, the modules that run it in ``tnc.modules``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tnc.errors import TNCError

Spec = dict[str, Any]


class Expression(abc.ABC):
    """A structured matrix: leaf terms combined by `Sum` and `Product`."""

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @abc.abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix, in the widest float dtype stored and at least float32; float64 where exactness needs it."""

    @abc.abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T`` in the dtype of ``x``: (..., in_features) to (..., out_features)."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name; children of a combinator are prefixed by their index."""

    @abc.abstractmethod
    def spec(self) -> Spec:
        """JSON-able description; with `tensors` it rebuilds the expression (`from_spec`)."""

    @property
    def storage_bits(self) -> int:
        """Bits of all stored tensors, which are packed in memory as on disk."""
        return sum(t.numel() * t.element_size() * 8 for t in self.tensors().values())

    @classmethod
    @abc.abstractmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Expression:
        """Inverse of (`spec`, `tensors`)."""


E = TypeVar("E", bound=type[Expression])
_KINDS: dict[str, type[Expression]] = {}


def register(cls: E) -> E:
    """Make a term known to `from_spec` under its ``kind``; a kind can be taken once."""
    if cls.kind in _KINDS:
        owner = _KINDS[cls.kind].__qualname__
        raise TNCError(f"term kind {cls.kind!r} is already registered by {owner}; choose another.")
    _KINDS[cls.kind] = cls
    return cls


def kinds() -> tuple[str, ...]:
    """Names of all registered term kinds, sorted."""
    return tuple(sorted(_KINDS))


def from_spec(spec: Spec, tensors: Mapping[str, Tensor]) -> Expression:
    """Rebuild an expression from its description and tensors.

    Raises:
        TNCError: if the kind is unknown; lists the known ones.
    """
    kind = spec.get("kind")
    if kind not in _KINDS:
        raise TNCError(
            f"unknown term kind {kind!r}; this version of tnc knows {', '.join(kinds())}. "
            "Upgrade tnc, or import the package that registers the kind."
        )
    return _KINDS[kind].from_parts(spec, tensors)


def map_tensors(expression: Expression, function: Callable[[Tensor], Tensor]) -> Expression:
    """The same expression with ``function`` applied to every stored tensor."""
    return from_spec(expression.spec(), {k: function(t) for k, t in expression.tensors().items()})


def cast(expression: Expression, dtype: torch.dtype) -> Expression:
    """The same expression with its floating-point tensors in ``dtype``; packed codes stay as they are."""
    return map_tensors(expression, lambda t: t.to(dtype) if t.is_floating_point() else t)


def dense64(expression: Expression) -> Tensor:
    """The matrix an expression stands for **as stored**, evaluated in float64."""
    return cast(expression, torch.float64).to_dense().double()


def wide(*tensors: Tensor) -> torch.dtype:
    """Widest float dtype among ``tensors``, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
