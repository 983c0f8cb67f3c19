"""Neurons of a gated MLP in another order: rows of gate and up, columns of down; the output is the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tnc.decompose import MpoStage, Size
from tnc.errors import ModelError, ShapeError
from tnc.metric import Metric
from tnc.models.layers import is_linear, weight_of
from tnc.networks.shared_order import Rows, SharedOrder, shared_order
from tnc.stats import LayerStats

NAMES = (("gate_proj", "up_proj"), "down_proj")

STORED = torch.float16
"""Of a number of the operators that `neuron_order` aims at."""


def neuron_order(
    weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats], rank: Size, *,
    names: tuple[tuple[str, ...], str] = NAMES, rounds: int = 3,
) -> SharedOrder:  # fmt: skip
    """The order of an MLP's neurons in which two-core operators of its layers together lose fewest nats, by search.

    It is absorbed by `permute_neurons`; where no order is better, it is the given one.

    Args:
        weights: (out_features, in_features) of each of the named layers.
        stats: of each of them.
        rank: bond dimension; `BitsPerWeight` counts 16 bits a number.
        names: the layers whose rows are neurons, and the one whose columns are.
        rounds: alternations from each start.

    Raises:
        ShapeError, BudgetError, RankError: as `shared_order` and `MpoStage`.

    Cost: as `shared_order`.
    """
    stage, found = MpoStage(rank), []
    for name in (*names[0], names[1]):
        weight, metric = weights[name], Metric.auto(stats[name])
        shape = (weight.shape[0], weight.shape[1])
        bond, (outs, ins) = stage.bond(shape, STORED), stage.modes(shape)
        if name == names[1]:
            found.append(Rows(weight.T, bond, (ins, outs), Metric(metric.gradient, metric.hessian)))
        else:
            found.append(Rows(weight, bond, (outs, ins), metric))
    return shared_order(found, rounds=rounds)


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
