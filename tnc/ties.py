"""Tensors that several factored layers hold as one: stored once, counted once, one also after every move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tnc.modules import FactoredLinear, Tie
from tnc.terms import Expression


def share_tensors(layers: Sequence[FactoredLinear], operators: Sequence[Expression]) -> None:
    """Where the operators that the layers were made from hold one tensor in common, let the layers do so too."""
    owners: dict[int, tuple[FactoredLinear, str]] = {}
    for layer, operator in zip(layers, operators, strict=True):
        for name, tensor in operator.tensors().items():
            owner, known = owners.setdefault(id(tensor), (layer, name))
            if owner is not layer:
                layer.hold(name, owner.operator.tensors()[known])
    keep_ties(layers)


def keep_ties(layers: Iterable[FactoredLinear]) -> None:
    """Buffers that are one tensor in several layers stay one when the layers move."""
    holders: dict[int, list[tuple[FactoredLinear, str, Tensor]]] = {}
    for layer in layers:
        buffers = {id(buffer) for buffer in layer.buffers(recurse=False)}
        for name, tensor in layer.operator.tensors().items():
            if id(tensor) in buffers:
                holders.setdefault(id(tensor), []).append((layer, name, tensor))
    for group in holders.values():
        if len(group) > 1:
            tie = Tie(group[0][2])
            for layer, name, tensor in group:
                layer.hold(name, tensor, tie)


def distinct_bits(layers: Iterable[FactoredLinear]) -> int:
    """Bits that layers store in the place of their weights, tensors that several hold counted once."""
    tensors = [tensor for layer in layers for tensor in layer.operator.tensors().values()]
    return sum(t.numel() * t.element_size() * 8 for t in {id(t): t for t in tensors}.values())
