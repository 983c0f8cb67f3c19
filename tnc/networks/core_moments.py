"""The two moments in which a core is rounded: partial traces of the normal matrix of its local problem."""

from __future__ import annotations

from math import prod

import torch
from opt_einsum import contract
from torch import Tensor

from tnc.networks.local import Local, by_side
from tnc.networks.modes import Modes

_LEGS = "aoib"  # of a core: bond before, output, input, bond behind; capitals are the second index of the form


def core_moments(local: Local, cut: int) -> tuple[Tensor, Tensor]:
    """Moments of the columns and rows of a core (a, o, i, b) as a matrix, its first ``cut`` legs the rows.

    With L and R the environments, ``tr(Ŵᵀ G Ŵ H)`` is a quadratic form N in the core. Its traces over rows and over
    columns are the sides of the Kronecker product that stands for it when the core is rounded; where G and H are
    products over the modes, or there is one row, N is that product.

    Returns:
        (columns, columns) and (rows, rows), float64, up to a common scale.

    Cost: for (o, i b) of two sites ``n² b²`` multiply-adds, and memory for the moments.
    """
    layer, k = local.layer, local.first
    outs, ins = layer.out_modes, layer.in_modes
    left = by_side(local.left.T, outs[:k], ins[:k])  # (a, outputs, inputs)
    right = by_side(local.right, outs[k + 1 :], ins[k + 1 :])
    gradient = _legs(layer.metric.gradient, len(layer.weight), outs, k, left)
    hessian = _legs(layer.metric.hessian, layer.weight.shape[1], ins, k, left)
    operands = (left, left, gradient, hessian, right, right)
    return _traced(_LEGS[cut:], operands), _traced(_LEGS[:cut], operands)


def _traced(kept: str, operands: tuple[Tensor, ...]) -> Tensor:
    """The normal matrix over the legs ``kept``, traced over the others."""
    a, o, i, b = (leg.upper() if leg in kept else leg for leg in _LEGS)
    equation = f"apx,{a}qy,posq{o}t,xizy{i}w,bsz,{b}tw->{kept}{kept.upper()}"
    moment: Tensor = contract(equation, *operands)
    size = prod(moment.shape[: len(kept)])
    square = moment.reshape(size, size)
    return (square + square.T) / 2


def _legs(side: Tensor | None, features: int, modes: Modes, k: int, like: Tensor) -> Tensor:
    """A side of the metric as (before, mode, behind, before, mode, behind), padded with zeros."""
    full = like.new_zeros(prod(modes), prod(modes))
    known = like.new_ones(features) if side is None else side
    full[:features, :features] = torch.diag(known) if known.ndim == 1 else known
    legs = (prod(modes[:k]), modes[k], prod(modes[k + 1 :]))
    return full.reshape(*legs, *legs)
