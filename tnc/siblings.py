"""Groups of layers that a model calls with one input: made, found, and taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from tnc.errors import ModelError
from tnc.modules import FactoredLinear, Siblings


def join_siblings(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Let `FactoredLinear` layers that are called with one input compute what they have in common once.

    `tnc.compress` does it for layers that calibration saw with one input, checkpoints keep it. Nothing else about
    the layers changes; their group is no part of the ``state_dict``. A layer is in one group at most.

    Args:
        model: with `FactoredLinear` layers.
        groups: names of layers; a group of one is left alone.

    Raises:
        ModelError: if a name is no `FactoredLinear` layer, or in two groups.
    """
    wanted = [(names, [_layer(model, name) for name in names]) for names in groups]
    every = [name for names, _ in wanted for name in names]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise ModelError(f"join_siblings got {', '.join(twice)} more than once; expected each layer in one group.")
    for names, layers in wanted:
        if len(layers) > 1:
            group = Siblings(names)
            for place, layer in enumerate(layers):
                layer.join(group, place)


def part_siblings(model: nn.Module) -> None:
    """Let every layer run by itself again: the off switch."""
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            module.join(None)


def sibling_groups(model: nn.Module) -> list[list[str]]:
    """Names of the layers of every group, in the order of the model; groups of which one layer is left are none."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear) and module.siblings is not None:
            found.setdefault(id(module.siblings), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _layer(model: nn.Module, name: str) -> FactoredLinear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, FactoredLinear):
        found = "nothing" if layer is None else type(layer).__name__
        raise ModelError(f"join_siblings got {name!r}, which is {found}; expected the name of a FactoredLinear layer.")
    return layer
