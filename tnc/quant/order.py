"""In which order columns are rounded: later ones make up for the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tnc.errors import FormatError


def activation_order(diagonal: Tensor, group: int) -> Tensor:
    """Columns by falling ``diag(H)`` ("act-order"); groups of scales stay as they are."""
    return torch.argsort(diagonal, descending=True, stable=True)


def group_order(diagonal: Tensor, group: int) -> Tensor:
    """Groups by falling mean of ``diag(H)``, columns by falling ``diag(H)`` inside each: groups are kept whole."""
    size = -(-len(diagonal) // group) * group
    padded = torch.nn.functional.pad(diagonal, (0, size - len(diagonal)), value=-torch.inf).reshape(-1, group)
    inside = torch.argsort(padded, dim=1, descending=True, stable=True)
    live = padded.isfinite()
    mean = padded.masked_fill(~live, 0).sum(1) / live.sum(1)
    outside = torch.argsort(mean, descending=True, stable=True)
    order = (inside + torch.arange(0, size, group, device=diagonal.device).unsqueeze(1))[outside].flatten()
    return order[order < len(diagonal)]


def natural_order(diagonal: Tensor, group: int) -> Tensor:
    """Columns as they stand."""
    return torch.arange(len(diagonal), device=diagonal.device)


ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "activation": activation_order, "group": group_order, "natural": natural_order,
}  # fmt: skip
"""Orders of columns by name: ``(diag(H), group size) -> (n,)`` column numbers."""


def column_order(name: str, diagonal: Tensor, group: int) -> Tensor:
    """The order called ``name``.

    Raises:
        FormatError: if there is none (lists them).
    """
    if name not in ORDERS:
        raise FormatError(f"order={name!r} is unknown; expected one of {', '.join(ORDERS)}.")
    return ORDERS[name](diagonal, group)
