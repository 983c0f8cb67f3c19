"""AWQ's scalings of a whole model, folded into what makes the inputs: nothing is stored, nothing runs online.

``W diag(s)`` reads ``x / s``. The division goes into the gain of the RMS norm before q, k, v or gate, up; into the rows
of the value projection before the output projection; and into the rows of the up projection before the down projection,
where a gated MLP multiplies by it. All layers behind one place share its s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tnc.decompose.scaling import awq_scale, scale_inputs
from tnc.decompose.transforms import transform_moments
from tnc.errors import ModelError, StatsError
from tnc.formats import NumberFormat
from tnc.metric import Metric
from tnc.models.residual import assign, gain_of, residual_stream, same_logits, set_gain
from tnc.quant import rtn
from tnc.stats import LayerStats
from tnc.terms import Diagonal, dense64

_TOLERANCE = 1e-4  # of the largest logit, as in rotate_model


@dataclass(frozen=True, eq=False)
class ScaledModel:
    """What `scale_model` returns.

    Attributes:
        model: the scaled model, equal to the one given as long as nothing is quantized.
        stats: its layers' statistics.
        alphas: AWQ's alpha of every place, by the name of the norm or layer that divides.
    """

    model: nn.Module
    stats: dict[str, LayerStats]
    alphas: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a scaling can hide: a norm or the rows of a layer divide, the columns of readers multiply.

    ``copies`` of every divided feature reach the readers (grouped-query attention), ``width`` features at a time.
    """

    name: str
    divides: nn.Module
    readers: dict[str, Tensor]
    copies: int = 1
    width: int = 1


def scale_model(
    model: nn.Module, stats: Mapping[str, LayerStats], format: NumberFormat, *, grid: int = 20
) -> ScaledModel:
    """The model with AWQ's scalings folded in, ready to be quantized with the statistics returned.

    At every place alpha is the one of the grid whose unclipped `rtn` of all layers behind it has the least error, in
    nats where gradients were calibrated and in H elsewhere; at alpha = 0 nothing changes.

    Args:
        model: a Llama-like causal language model of transformers, float32 or float64; a copy is changed.
        stats: of the layers to be quantized; the others are scaled along.
        format: number format that the search rounds to.
        grid: number of alphas ``0, 1/grid, ..., 1 - 1/grid``.

    Raises:
        ModelError: if the model is of another build or its logits would change by more than 1e-4 of the largest.
        StatsError: if the statistics are of other layers.

    Source: AWQ (arXiv:2306.00978) section 3.2, with exact errors from H and G in the place of a sample's.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ModelError(f"scale_model got weights in {dtype}; expected float32, which loses nothing: model.float().")
    target, changed = copy.deepcopy(model), dict(stats)
    alphas: dict[str, float] = {}
    weights = {name.removesuffix(".weight"): parameter.detach() for name, parameter in target.named_parameters()}
    missing = [name for name in stats if name not in weights]
    if missing:
        raise StatsError(f"the statistics hold {missing[0]!r}, which the model has not; pass those of this model.")
    for place in _places(target):
        readers = [name for name in (k.removesuffix(".weight") for k in place.readers) if name in stats]
        if readers:
            step, scale = _search(place, {n: (weights[n], changed[n]) for n in readers}, format, grid)
            alphas[place.name] = step / grid
            if step:
                _fold(place, scale, changed)
    same_logits(model, target, _TOLERANCE)
    return ScaledModel(target, changed, alphas)


def _places(model: nn.Module) -> Iterator[_Place]:
    """Norms with their readers, then value and up projections with theirs; the last norm scales only the head."""
    for reading in residual_stream(model).readings[:-1]:
        yield _Place(*reading.norm, reading.readers)
    modules = dict(model.named_modules())
    for into, out in (("v_proj", "o_proj"), ("up_proj", "down_proj")):
        for name, maker in modules.items():
            reader = modules.get(f"{name.removesuffix(into)}{out}")
            if name.endswith(f".{into}") and isinstance(maker, nn.Linear) and isinstance(reader, nn.Linear):
                copies, rest = divmod(reader.in_features, maker.out_features)
                width = getattr(modules[name.rpartition(".")[0]], "head_dim", 1) if into == "v_proj" else 1
                if rest == 0:
                    yield _Place(name, maker, {f"{name.removesuffix(into)}{out}.weight": reader.weight}, copies, width)


def _search(
    place: _Place, layers: Mapping[str, tuple[Tensor, LayerStats]], format: NumberFormat, grid: int
) -> tuple[int, Tensor]:
    """The best step of the grid and its scale of the divided features."""
    first = next(iter(layers.values()))[1]
    best: tuple[float, int, Tensor] | None = None
    for step in range(grid):
        scale = _shared(awq_scale(first, step / grid), place)
        error = sum(_error(weight, stats, format, _spread(scale, place)) for weight, stats in layers.values())
        if best is None or error < best[0]:
            best = (error, step, scale)
    assert best is not None
    return best[1], best[2]


def _error(weight: Tensor, stats: LayerStats, format: NumberFormat, scale: Tensor) -> float:
    inner = scale_inputs(weight, stats, scale)
    term = rtn(inner.weight.float(), format, stats=inner.stats, clip_ratios=(1.0,))
    assert inner.stats is not None
    return Metric.auto(inner.stats).squared_norm((inner.weight - dense64(term)).float())


def _shared(scale: Tensor, place: _Place) -> Tensor:
    """One scale for all copies of a feature: their geometric mean."""
    copies = scale.log().reshape(-1, place.copies, place.width)
    mean: Tensor = copies.mean(1).flatten().exp()
    return mean


def _spread(scale: Tensor, place: _Place) -> Tensor:
    """The scale of the readers' columns from that of the divided features; inverse of `_shared`."""
    return scale.reshape(-1, 1, place.width).expand(-1, place.copies, -1).flatten()


def _fold(place: _Place, scale: Tensor, stats: dict[str, LayerStats]) -> None:
    """Divide where the features are made, multiply the readers; in place, and the statistics along."""
    columns = _spread(scale, place)
    for name, weight in place.readers.items():
        assign(weight, weight.double() * columns)
        layer = name.removesuffix(".weight")
        if layer in stats:
            stats[layer] = _of_scaled_inputs(stats[layer], 1 / columns)
    if not isinstance(place.divides, nn.Linear):
        gain, offset = gain_of(place.divides, place.name)
        set_gain(place.divides, gain / scale, offset)
        return
    assign(place.divides.weight, place.divides.weight.double() / scale.unsqueeze(1))
    if place.divides.bias is not None:
        assign(place.divides.bias, place.divides.bias.double() / scale)
    moments = stats.get(place.name)
    if moments is not None and moments.gradient is not None:
        stats[place.name] = replace(moments, gradient=transform_moments(moments.gradient, Diagonal(scale)))


def _of_scaled_inputs(stats: LayerStats, factor: Tensor) -> LayerStats:
    diagonal = Diagonal(factor)
    heldout = None if stats.heldout is None else transform_moments(stats.heldout, diagonal)
    return replace(stats, inputs=transform_moments(stats.inputs, diagonal), heldout=heldout)
