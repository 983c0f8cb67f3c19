"""From what the hooks of one block gathered to `LayerStats`: shared means where a layer saw no token of its own.

The router of a mixture sends a token to a few experts. An expert's H is the mean over its own tokens; its G is the mean
over all tokens of the text, zero where the token went elsewhere, so that ``½ tr(Eᵀ G E H)`` stays in nats per token of
text. An expert that no token reached takes the means of its siblings, and the report says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce

from torch import nn

from tnc.errors import StatsError
from tnc.models.capture import InputCapture
from tnc.models.layers import weight_of
from tnc.stats import LayerStats, Moments


def collect(
    layers: Mapping[str, nn.Module], captures: tuple[InputCapture, InputCapture],
    gradients: Mapping[str, Moments | None], tokens: int,
) -> dict[str, LayerStats]:  # fmt: skip
    """Statistics of the layers of one block.

    Args:
        layers: by name.
        captures: inputs of the calibration and of the held-out tokens.
        gradients: moments of the gradients that arrived, by name; ``None`` without gradients.
        tokens: calibration tokens of the text.

    Raises:
        StatsError: for a layer that no calibration token reached and that has no sibling: a layer of the same
            shape whose name differs in numbers only, inside its block.
    """
    inputs, heldout = captures[0].moments(), captures[1].moments()
    collected = {}
    for name in layers:
        notes = []
        own = inputs.get(name)
        if own is None:
            own = _shared(name, layers, inputs)
            notes.append("no calibration token reached this layer: H is the mean of its siblings")
        held = heldout.get(name)
        if held is None and heldout and (siblings := _siblings(name, layers, heldout)):
            held = reduce(Moments.merge, siblings)
            notes.append("no held-out token reached this layer: the held-out H is the mean of its siblings")
        gradient = gradients.get(name)
        if gradient is not None and not gradient.tokens:
            gradient = _of_one_token(name, layers, gradients)
            notes.append("no gradient reached this layer: G is that of its siblings, at the share of one token")
        collected[name] = LayerStats(own, held, None if gradient is None else gradient.over(tokens), tuple(notes))
    return collected


def _of_one_token(name: str, layers: Mapping[str, nn.Module], gradients: Mapping[str, Moments | None]) -> Moments:
    """The siblings' mean as if one token had passed; zero where no sibling got a gradient."""
    reached = {other: moments for other, moments in gradients.items() if moments is not None and moments.tokens}
    siblings = _siblings(name, layers, reached)
    own = gradients[name]
    assert own is not None
    return replace(reduce(Moments.merge, siblings), tokens=1) if siblings else replace(own, tokens=1)


def _shared(name: str, layers: Mapping[str, nn.Module], moments: Mapping[str, Moments]) -> Moments:
    siblings = _siblings(name, layers, moments)
    if not siblings:
        unreached = sum(1 for each in layers if each not in moments)
        raise StatsError(
            f"no calibration token reached layer {name!r} ({unreached} of {len(layers)} layers in its block) and "
            "it has no sibling to share with; expected at least one. Pass more calibration text, or exclude this layer."
        )
    return reduce(Moments.merge, siblings)


def _siblings(name: str, layers: Mapping[str, nn.Module], moments: Mapping[str, Moments]) -> list[Moments]:
    """Distinct moments of the layers of the block that differ from ``name`` in numbers only."""
    alike = [
        other for other in layers
        if other in moments and _role(other) == _role(name)
        and weight_of(layers[other]).shape == weight_of(layers[name]).shape
    ]  # fmt: skip
    return list({id(moments[other]): moments[other] for other in alike}.values())


def _role(name: str) -> str:
    return re.sub(r"\d+", "#", name)
