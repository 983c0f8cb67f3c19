"""Neurons of a gated MLP in another order: rows of gate and up, columns of down; the output is the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnc.errors import ModelError, ShapeError
from tnc.models.layers import is_linear, weight_of

NAMES = (("gate_proj", "up_proj"), "down_proj")


def permute_neurons(mlp: nn.Module, order: Tensor, *, names: tuple[tuple[str, ...], str] = NAMES) -> None:
    """Put neuron ``order[i]`` of an MLP in place i, in place; what the MLP computes does not change.

    An order found for ``down_proj``'s columns, or the rows of gate and up, is so absorbed for nothing: no index is
    stored.

    Args:
        mlp: module with the named linear layers; any elementwise activation between them.
        order: (neurons,) each of ``0 .. neurons - 1`` once.
        names: the layers whose rows are neurons, and the one whose columns are.

    Raises:
        ModelError: if a layer is missing or not linear.
        ShapeError: if ``order`` is no permutation of the neurons.
    """
    into, out = [_layer(mlp, name) for name in names[0]], _layer(mlp, names[1])
    count = weight_of(out).shape[1]
    if not torch.equal(order.sort().values.cpu(), torch.arange(count)):
        raise ShapeError(
            f"permute_neurons got an order of shape {tuple(order.shape)}; expected each of 0 .. {count - 1} once."
        )
    with torch.no_grad():
        for layer in into:
            weight_of(layer).copy_(weight_of(layer)[order].clone())
            bias = getattr(layer, "bias", None)
            if isinstance(bias, Tensor):
                bias.copy_(bias[order].clone())
        weight_of(out).copy_(weight_of(out)[:, order].clone())


def _layer(mlp: nn.Module, name: str) -> nn.Module:
    layer = getattr(mlp, name, None)
    if not isinstance(layer, nn.Module) or not is_linear(layer):
        raise ModelError(
            f"permute_neurons: {type(mlp).__name__} has no linear layer {name!r}; give the names of its layers."
        )
    return layer
