"""Layers of one shape that run together, each on the tokens routed to it: what `tnc.experts` asks of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tnc.kernels.table import Bound, Tensors

Routing = tuple[Tensor, Tensor]
"""Order and tiles, as `Grouping.route` makes them of (pairs,) experts."""


@runtime_checkable
class Layer(Protocol):
    """A layer that may be grouped: `tnc.FactoredLinear`."""

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves it."""

    @property
    def bound_kernel(self) -> Bound:
        """The kernel: another object whenever the layer was bound anew."""

    def bound(self) -> tuple[Bound, dict[str, Tensor]]:
        """The kernel, and the very tensors it is called with."""


class Group(Protocol):
    """Layers of all experts with their tensors side by side."""

    def __call__(self, x: Tensor, index: Tensor, routing: Routing) -> Tensor:
        """(pairs, out_features), zero for pairs of no expert; pair p takes row ``p // n`` of x (pairs / n, in)."""

    def views(self) -> list[dict[str, Tensor]]:
        """For each layer the parts of the group that are its tensors, by the names of the kernel."""

    def describe(self) -> str:
        """One line: what runs."""


@dataclass(frozen=True)
class Grouping:
    """How the layers of one kernel run together.

    Attributes:
        stack: bound kernels and their tensors to the group, or to the reason why there is none.
        route: (pairs,) experts and their number to a `Routing`.
        weighted_sum: rows of pairs, weights (tokens, k), experts (tokens, k) and their number to (tokens, n).
    """

    stack: Callable[[Sequence[Bound], Sequence[Tensors]], Group | str]
    route: Callable[[Tensor, int], Routing]
    weighted_sum: Callable[[Tensor, Tensor, Tensor, int], Tensor]


GROUPINGS: dict[str, Grouping] = {}
"""By name of the kernel; filled by the kernels that do it."""


def grouped(layers: Sequence[object]) -> tuple[Grouping, Group] | str:
    """The layers as a group, or the reason why each runs by itself. Their tensors become views of the group's.

    Memory: a second copy of the layers' tensors until it returns.
    """
    ready = [layer for layer in layers if isinstance(layer, Layer)]
    if len(ready) < len(layers) or not ready:
        return "not all of its layers are factored"
    names = sorted({layer.kernel for layer in ready})
    if len(names) > 1:
        return f"its layers run different kernels: {', '.join(names)}"
    if names[0] not in GROUPINGS:
        return f"kernel {names[0]} runs one layer at a time"
    kernels, tensors = zip(*(layer.bound() for layer in ready), strict=True)
    with torch.inference_mode(False), torch.no_grad():
        group = GROUPINGS[names[0]].stack(kernels, tensors)
        if isinstance(group, str):
            return group
        for held, views in zip(tensors, group.views(), strict=True):
            for name, view in views.items():
                held[name].data = view
    return GROUPINGS[names[0]], group
