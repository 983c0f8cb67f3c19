"""From a model and its statistics to error curves and a plan, and to plans whose error is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tnc.checkpoint.journal import digest
from tnc.checkpoint.save import stored_tensors
from tnc.errors import BudgetError, StatsError
from tnc.models.compress import compress
from tnc.models.evaluate import Evaluation, evaluate
from tnc.models.layer_scores import scores_alone
from tnc.models.layers import select_layers, weight_of
from tnc.models.text import TokenWindows
from tnc.planning import (
    Budget,
    CurveTable,
    LayerCurves,
    Nats,
    PerplexityIncrease,
    Plan,
    Portfolio,
    Rules,
    describe_budget,
    input_groups,
    measure_layers,
    plan_curves,
)
from tnc.stats import LayerStats, Moments

Progress = Callable[[str, int, int], None]
Windows = TokenWindows | Iterable[Tensor]


class MeasureLayers(Protocol):
    """The signature of `tnc.planning.measure_layers`."""

    def __call__(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats], portfolio: Portfolio, *,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[str, LayerCurves]]:  # fmt: skip
        """Curves of all layers by name."""


_PRIOR = 1.2  # measured KL over predicted, before anything was measured (MATH.md section 0: 1.2 to 1.35)
_CLOSE = 0.95  # a measured plan that uses this share of its budget is not improved further


def error_curves(
    model: nn.Module, stats: Mapping[str, LayerStats], portfolio: Portfolio | None = None, *,
    include: Iterable[str] | None = None, exclude: Iterable[str] | None = None, dtype: torch.dtype | None = None,
    cache: Path | None = None, progress: Progress | None = None, measure: MeasureLayers = measure_layers,
) -> CurveTable:  # fmt: skip
    """Error curves of every layer, for any number of plans.

    Args:
        model: dense.
        stats: from `tnc.calibrate`.
        portfolio: what is tried; ``None`` is `Portfolio.default`.
        include: glob patterns of layer names, see `tnc.compress`.
        exclude: the same, of layers to leave as they are.
        dtype: of plain factors and dense layers; ``None`` is that of the weights.
        cache: file that is read if it exists, else written.
        progress: called with ("curves", layers done, layers in all).
        measure: what measures the layers, in any order; another may do it in many processes.

    Raises:
        StatsError: if statistics of a layer are missing.
        BudgetError: if the cache is of another model, calibration or portfolio.

    Cost: one fit of every base for each layer; see `tnc.planning.measure_groups`.
    """
    portfolio = portfolio or Portfolio.default()
    layers = select_layers(model, include, exclude)
    missing = [name for name in layers if name not in stats]
    if missing:
        raise StatsError(
            f"the statistics lack {len(missing)} of {len(layers)} layers, the first is {missing[0]!r}; calibrate this "
            "model again, or exclude those layers."
        )
    weights = {name: weight_of(layer).detach() for name, layer in layers.items()}
    stored = dtype or next(iter(weights.values())).dtype
    fingerprint = _fingerprint(weights, stats, portfolio, stored)
    if cache is not None and cache.exists():
        return CurveTable.load(cache, fingerprint=fingerprint)
    curves: dict[str, LayerCurves] = {}
    for name, found in measure(weights, stats, portfolio, dtype=dtype):
        curves[name] = found
        if progress is not None:
            progress("curves", len(curves), len(weights))
    curves = {name: curves[name] for name in weights}  # in model order
    groups = input_groups({name: stats[name] for name in weights})
    seen_together = tuple(tuple(names) for names in groups if len(names) > 1)
    table = CurveTable(curves, portfolio, seen_together, _other_bytes(model, weights), str(stored)[6:], fingerprint)
    if cache is not None:
        table.save(cache)
    return table


def plan(
    model: nn.Module, stats: Mapping[str, LayerStats], budgets: Budget | Sequence[Budget], *,
    portfolio: Portfolio | None = None, rules: Rules | None = None, curves: CurveTable | None = None,
    windows: Windows | None = None, dtype: torch.dtype | None = None, progress: Progress | None = None,
) -> Plan:  # fmt: skip
    """Choose base, rank and factor format of every layer under one budget.

    Args:
        model: dense.
        stats: from `tnc.calibrate`.
        budgets: one, or several that all hold: `BitsPerWeight`, `Bytes`, `Nats`, `PerplexityIncrease`,
            `RelativeError` (of every layer), `Latency`, `Speedup`.
        portfolio: what may be chosen; ``None`` is `Portfolio.default`. Not used where ``curves`` are given.
        rules: constraints, fused groups, weights, clock.
        curves: from `error_curves`; ``None`` measures them.
        windows: held-out token windows. With them `Nats` and `PerplexityIncrease` are met as measured: the plan is
            compressed and scored, a few times, and the scale of the prediction follows the measurement.
        dtype: of plain factors and dense layers; ``None`` is that of the weights.
        progress: called with (stage, done, total).

    Raises:
        BudgetError: see `plan_curves`; with windows also if no plan tried meets the budget as measured.
        StatsError: if statistics of a layer are missing.
    """
    table = curves or error_curves(model, stats, portfolio, dtype=dtype, progress=progress)
    wanted = (budgets,) if not isinstance(budgets, Sequence) else tuple(budgets)
    measured = [each for each in wanted if isinstance(each, Nats | PerplexityIncrease)]
    if windows is None or not measured:
        return plan_curves(table, wanted, rules)
    search = _Search(model, stats, table, wanted, rules, list(windows), dtype, progress)
    return search.run(measured[0])


def measure_plan(
    model: nn.Module, stats: Mapping[str, LayerStats], plan: Plan, windows: Windows, *,
    dtype: torch.dtype | None = None, alone: bool = False, progress: Progress | None = None,
) -> Plan:  # fmt: skip
    """The plan with what it does to the model: compressed, scored, its scale the measured over the predicted KL.

    Args:
        model: dense.
        stats: as for `plan`.
        plan: of this model.
        windows: held-out token windows.
        dtype: of plain factors and dense layers; ``None`` is that of the weights.
        alone: score each layer compressed alone, too, to hold against its prediction, and each block: ``measured``
            then has their sums, ``layers_alone`` and ``blocks_alone``. What the second has above the first is between
            the layers of a block, what the whole has above the second is between blocks.
        progress: called with (stage, done, total).

    Raises:
        ModelError, StatsError, TextError: as `tnc.compress` and `tnc.evaluate`.

    Cost: one compression and one pass over the windows; with ``alone`` a pass a layer and a block.
    """
    texts = list(windows)
    small = compress(model, plan, stats=stats, dtype=dtype, progress=progress)
    scores = evaluate(small, texts, reference=model, progress=progress)
    plain = replace(plan, scale=1.0)
    found = replace(plan, measured=scores.to_json(), scale=_scale(scores, plain))
    if not alone:
        return found
    groups = [*((name,) for name in plan.layers), *_blocks(plan.layers)]
    each = scores_alone(model, small, groups, texts, progress=progress)
    layers = {name: replace(layer, measured=kl) for (name, layer), kl in zip(plan.layers.items(), each, strict=False)}
    sums = {"layers_alone": sum(each[: len(layers)]), "blocks_alone": sum(each[len(layers) :])}
    return replace(found, layers=layers, measured=scores.to_json() | sums)


def _blocks(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers of one block: those whose names have the same first number."""
    found: dict[str, list[str]] = {}
    for name in names:
        number = next((part for part in name.split(".") if part.isdigit()), name)
        found.setdefault(number, []).append(name)
    return [tuple(block) for block in found.values()]


@dataclass(frozen=True, eq=False)
class _Search:
    """Line search over the predicted error for the fewest bits whose measured error is within the budget."""

    model: nn.Module
    stats: Mapping[str, LayerStats]
    table: CurveTable
    budgets: tuple[Budget, ...]
    rules: Rules | None
    windows: list[Tensor]
    dtype: torch.dtype | None
    progress: Progress | None

    def run(self, budget: Nats | PerplexityIncrease, measurements: int = 5) -> Plan:
        """The best plan measured; between bounds the next level is the one that the last ratio predicts."""
        target = budget.value if isinstance(budget, Nats) else budget.nats
        level, low, high = target / _PRIOR, 0.0, math.inf
        best: Plan | None = None
        tried = []
        for _ in range(measurements):
            found = self._measure(level)
            assert found.measured is not None
            value = found.measured["kl" if isinstance(budget, Nats) else "delta_nats"]
            tried.append(f"{value:.4g} nats at {found.bits_per_weight:.3f} bits")
            if value <= target:
                best, low = (
                    (found, level) if best is None or found.bits_per_weight < best.bits_per_weight else (best, low)
                )
            else:
                high = min(high, level)
            if _CLOSE * target <= value <= target:
                break
            level = _next_level(level, value, target, low, high)
        if best is None:
            raise BudgetError(
                f"no plan met {describe_budget(budget)} ({target:.4g} nats) as measured on {len(self.windows)} "
                f"windows; measured were {', '.join(tried)}. Ask for more, or score more text."
            )
        return replace(best, notes=(f"measured plans: {'; '.join(tried)}", *best.notes))

    def _measure(self, level: float) -> Plan:
        """The plan of a predicted level, compressed and scored."""
        asked = tuple(Nats(level) if isinstance(b, Nats | PerplexityIncrease) else b for b in self.budgets)
        found = plan_curves(self.table, asked, self.rules)
        scored = measure_plan(self.model, self.stats, found, self.windows, dtype=self.dtype, progress=self.progress)
        return replace(scored, budgets=self.budgets)


def _scale(scores: Evaluation, found: Plan) -> float:
    """Measured over predicted KL."""
    predicted = found.predicted_nats
    return scores.kl / predicted if scores.kl and predicted else 1.0


def _next_level(level: float, value: float, target: float, low: float, high: float) -> float:
    """Where the ratio seen leads, kept between the levels known to be within and beyond the budget."""
    ratio = target / value if value > 0 else 4.0
    guess = level * min(max(ratio, 0.25), 4.0) * (0.98 if ratio < 1 else 1.0)
    if low < guess < high:
        return guess
    return math.sqrt(low * high) if low > 0 and math.isfinite(high) else level * (0.5 if math.isfinite(high) else 2.0)


def _other_bytes(model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Bytes of the checkpoint's tensors other than the planned weights."""
    everything = sum(t.numel() * t.element_size() for t in stored_tensors(model).values())
    return everything - sum(w.numel() * w.element_size() for w in weights.values())


def _fingerprint(
    weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats], portfolio: Portfolio, dtype: torch.dtype
) -> str:
    """Digest of the weights, of diagonal and row sums of every moment, and of the portfolio."""
    parts: list[Tensor | str | None] = [json.dumps(portfolio.to_json(), sort_keys=True), str(dtype)]
    for name, weight in weights.items():
        parts += [name, weight]
        for moments in (stats[name].inputs, stats[name].heldout, stats[name].gradient):
            parts += _marks(moments)
    return digest(parts)


def _marks(moments: Moments | None) -> list[Tensor | str | None]:
    if moments is None:
        return [None]
    return [str(moments.tokens), moments.second.diagonal().contiguous(), moments.second.sum(1)]
