"""Measured sensitivity: every layer compressed alone by one option, and its KL held against the prediction.

What a layer costs over its prediction is taken to be the same for all its options, so that one probe a layer corrects
them all: as weights of `tnc.planning.Rules` the probes make the objective of a plan the measured one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tnc.checkpoint.journal import digest
from tnc.errors import BudgetError
from tnc.models.compress import compress
from tnc.models.layer_scores import scores_alone
from tnc.models.text import TokenWindows
from tnc.planning import Choice, CurveTable, LayerCurves, Plan, plan_of
from tnc.planning.portfolio import DENSE
from tnc.stats import LayerStats


@dataclass(frozen=True)
class Probe:
    """One layer measured alone.

    Attributes:
        choice: what it was compressed by.
        predicted: nats of that choice, or its squared relative error where the curves have no gradients.
        kl: measured, nats per token.
    """

    choice: Choice
    predicted: float
    kl: float

    @property
    def weight(self) -> float:
        """For `Rules`: measured over predicted, 1 where nothing was predicted."""
        return self.kl / self.predicted if self.predicted > 0 else 1.0


def probe_layers(
    model: nn.Module, stats: Mapping[str, LayerStats], curves: CurveTable, windows: TokenWindows | Iterable[Tensor], *,
    bits: float = 3.0, dtype: torch.dtype | None = None, cache: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Probe]:  # fmt: skip
    """Compress and score each layer alone.

    Args:
        model: dense.
        stats: as for `tnc.plan`.
        curves: of this model; its layers are probed.
        windows: token windows, for example of the calibration text; not those that the plan is judged by.
        bits: per weight; of the options without low rank the one nearest to it is the probe.
        dtype: of dense layers; ``None`` is that of the weights.
        cache: file that is read if it exists, else written.
        progress: called with (stage, done, total).

    Returns:
        By layer name. ``Rules(weights={name: probe.weight for ...})`` plans by them.

    Raises:
        BudgetError: if a layer has no option without low rank but dense, or the cache is of other curves, windows or
            ``bits`` or cannot be written.
        ModelError, StatsError, TextError: as `tnc.compress` and `tnc.evaluate`.

    Cost: one compression, and a pass over the windows for each layer.
    """
    plan, texts = probe_plan(curves, bits), list(windows)
    asked = digest([curves.fingerprint, f"{bits}", *texts])
    if cache is not None and cache.exists():
        return _read(cache, plan, asked)
    small = compress(model, plan, stats=stats, dtype=dtype, progress=progress)
    scores = scores_alone(model, small, [(name,) for name in plan.layers], texts, progress=progress)
    if cache is not None:
        _write(cache, {"asked": asked, "kl": dict(zip(plan.layers, scores, strict=True))})
    return _probes(plan, scores)


def _write(cache: Path, found: Mapping[str, object]) -> None:
    """Whole or not at all: the scores took a pass over the text for each layer."""
    partial = cache.with_name(f"{cache.name}.partial")
    try:
        partial.write_text(json.dumps(found) + "\n", encoding="utf-8")
        partial.replace(cache)
    except OSError as error:
        raise BudgetError(f"probes could not be written to {cache}: {error}. Name a place that exists.") from error


def _probes(plan: Plan, scores: Sequence[float]) -> dict[str, Probe]:
    return {
        name: Probe(layer.choice, layer.error**2 if layer.nats is None else layer.nats, kl)
        for (name, layer), kl in zip(plan.layers.items(), scores, strict=True)
    }


def _read(cache: Path, plan: Plan, asked: str) -> dict[str, Probe]:
    try:
        found = json.loads(cache.read_text())
        measured, scores = found["asked"], [float(found["kl"][name]) for name in plan.layers]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BudgetError(f"probes {cache} are damaged ({error!r}); remove the file.") from error
    if measured != asked:
        raise BudgetError(
            f"probes {cache} are stale: they were measured with other curves, on other text or at other bits. Remove "
            "the file to measure again, or name another one."
        )
    return _probes(plan, scores)


def probe_plan(curves: CurveTable, bits: float = 3.0) -> Plan:
    """What `probe_layers` measures: of each layer the option without low rank nearest to ``bits`` per weight."""
    return plan_of(curves, {name: _nearest(name, layer, bits) for name, layer in curves.layers.items()})


def _nearest(name: str, layer: LayerCurves, bits: float) -> Choice:
    options = [o for o in layer.options if o.choice.rank == 0 and o.choice.base != DENSE]
    if not options:
        raise BudgetError(
            f"layer {name!r} has no option without low rank but dense, so nothing to probe it by; measure curves of a "
            "portfolio with a quantized base."
        )
    elements = layer.shape[0] * layer.shape[1]
    return min(options, key=lambda option: abs(option.bits / elements - bits)).choice
