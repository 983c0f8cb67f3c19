"""Leaves whose own ``linear`` is faster than any contraction: no matrix of theirs is ever formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from tnc.hadamard import transform_flops
from tnc.kernels.table import Tensors
from tnc.terms import Expression, Spec, from_spec

# Operations for one row of x. A product is cut at these leaves, and what lies between is contracted.
_ROW_FLOPS: dict[str, Callable[[Spec], float]] = {
    "hadamard": lambda spec: transform_flops(spec["shape"][0], spec["factors"]) + spec["shape"][0],
    "permutation": lambda spec: spec["shape"][0],
    "selection": lambda spec: spec["shape"][0],
}
FUSED: dict[str, Callable[[Spec, Tensors, Tensor], Tensor]] = {}
"""(spec, tensors, x) to the answer in one launch on a GPU, by kind; filled by the kernels that do it."""


@dataclass(frozen=True)
class Applied:
    """``leaf.linear(x)``, the leaf rebuilt from its tensors: a fast transform or a gather."""

    names: tuple[tuple[str, str], ...]  # (name in the leaf, name in the whole)
    spec: Spec
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        own = {inner: tensors[outer] for inner, outer in self.names}
        if x.device.type == "cuda" and self.spec["kind"] in FUSED:
            return FUSED[self.spec["kind"]](self.spec, own, x)
        return from_spec(self.spec, own).linear(x)

    def describe(self) -> str:
        """The kind of the leaf."""
        return f"fast {self.spec['kind']}" if self.spec["kind"] in _ROW_FLOPS else str(self.spec["kind"])


def is_applied(expression: Expression) -> bool:
    """Whether the expression is a leaf of this sort."""
    return expression.kind in _ROW_FLOPS


def applied(expression: Expression, prefix: str, tokens: int) -> Applied:
    """The plan of such a leaf for ``tokens`` rows; ``prefix`` is that of its tensors in the whole."""
    spec = expression.spec()
    names = tuple((name, prefix + name) for name in expression.tensors())
    return Applied(names, spec, tokens * _ROW_FLOPS[expression.kind](spec))
