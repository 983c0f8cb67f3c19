"""Error curves and planned layers in many processes of one thread: every base is fitted once, for both.

The processes are forked, so that they inherit weights and statistics, and hand each other fitted bases through a folder
(`tnc.checkpoint.Journal`): a run that is started again finds those of the run before.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnc import LayerStats, Plan, Portfolio, error_curves
from tnc.checkpoint import Journal
from tnc.checkpoint.journal import digest
from tnc.decompose import GivenStage, QuantizeStage
from tnc.decompose.best import decompose_by
from tnc.decompose.shared import decompose_shared
from tnc.formats import TrellisFormat
from tnc.models.useful_ranks import served_by
from tnc.planning import Choice, CurveTable, LayerCurves, input_groups
from tnc.planning.curves import curves_of
from tnc.planning.fits import LayerFits, fit_bases
from tnc.planning.shared_curves import with_shared
from tnc.terms import Expression

_Part = tuple[tuple[str, ...], Choice]  # layers that are made together


@dataclass(frozen=True, eq=False)
class Made:
    """One layer as stored.

    Attributes:
        bits: stored.
        nats: predicted, on held-out tokens.
        heldout: relative error on held-out tokens.
        matrix: (m, n) float32.
    """

    bits: int
    nats: float
    heldout: float
    matrix: Tensor


@dataclass(frozen=True, eq=False)
class Workshop:
    """What the processes work on.

    Attributes:
        weights: by layer name.
        stats: the same.
        portfolio: what is tried.
        dtype: of plain factors and dense layers.
        fitted: folder of the bases.
        jobs: processes.
    """

    weights: Mapping[str, Tensor]
    stats: Mapping[str, LayerStats]
    portfolio: Portfolio
    dtype: torch.dtype
    fitted: Journal
    jobs: int

    def curves(self, model: nn.Module, kept: Path | None = None) -> CurveTable:
        """The curves of all layers, from a file that was kept of this model and sample, or measured and kept there.

        Measuring fits every base that the folder lacks. What is made of a plan is measured again, so that curves of
        another sample would show.
        """
        if kept is not None and kept.exists():
            return CurveTable.load(kept)

        def measure(*_: object, **__: object) -> Iterator[tuple[str, LayerCurves]]:
            for _done in self._map(_fit, self._bases()):
                pass
            own = dict(self._map(_curves, self._by_size([[name] for name in self.weights])))
            groups = self._by_size(input_groups({name: self.stats[name] for name in self.weights}))
            for found in self._map(_shared, [(names, [own[name] for name in names]) for names in groups]):
                yield from found

        found = error_curves(model, self.stats, self.portfolio, include=list(self.weights), dtype=self.dtype,
                             measure=measure)  # fmt: skip
        if kept is not None:
            found.save(kept)
        return found

    def made(self, plans: Sequence[Plan]) -> Iterator[tuple[int, dict[str, Made]]]:
        """Number and layers of each plan, as they are finished; what several plans have in common is made once."""
        wanted = [self._parts(plan) for plan in plans]
        jobs = list(dict.fromkeys(part for parts in wanted for part in parts))
        found: dict[_Part, list[tuple[str, Made]]] = {}
        waiting = set(range(len(plans)))
        for part, layers in self._map(_make, jobs):
            found[part] = [(name, Made(*rest, torch.from_numpy(matrix))) for name, *rest, matrix in layers]
            for at in [at for at in sorted(waiting) if all(each in found for each in wanted[at])]:
                waiting.remove(at)
                yield at, dict(layer for each in wanted[at] for layer in found[each])

    def key(self, layer: str, base: str) -> str:
        """Of a fitted base in the folder."""
        stats = self.stats[layer]
        moments = (stats.inputs, stats.gradient)
        marks = [None if each is None else each.second.diagonal() for each in moments]
        described = self.portfolio.to_json()["bases"][base]
        return digest([json.dumps(described, sort_keys=True), self.weights[layer], *marks])

    def known(self, layer: str, bases: Iterable[str]) -> dict[str, Expression]:
        """The fitted ones of some bases of a layer."""
        records = {name: self.fitted.find(self.key(layer, name)) for name in bases}
        return {name: record.operator for name, record in records.items() if record is not None}

    def _bases(self) -> list[tuple[str, str]]:
        """(layer, base) that are quantized, the slowest first."""
        bases = {n: b.stage for n, b in self.portfolio.bases.items() if isinstance(b.stage, QuantizeStage)}
        pairs = [(layer, base) for layer in self.weights for base in bases]
        return sorted(pairs, key=lambda p: -_slowness(bases[p[1]]) * self.weights[p[0]].numel())

    def _by_size(self, groups: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        return sorted(groups, key=lambda names: -sum(self.weights[name].numel() for name in names))

    def _parts(self, plan: Plan) -> list[_Part]:
        """Layers with one right factor together, others alone, the largest first."""
        choices = {name: layer.choice for name, layer in plan.layers.items()}
        groups = input_groups({n: self.stats[n] for n, choice in choices.items() if choice.shared})
        alone = [[n] for n, choice in choices.items() if not choice.shared]
        return [(tuple(names), choices[names[0]]) for names in self._by_size([*groups, *alone])]

    def _map(self, work: Any, jobs: Sequence[Any]) -> Iterator[Any]:  # noqa: ANN401
        _WORK["workshop"] = self
        with multiprocessing.get_context("fork").Pool(self.jobs, _one_thread) as pool:
            yield from pool.imap_unordered(work, jobs)


_WORK: dict[str, Workshop] = {}  # inherited by the processes


def _one_thread() -> None:
    torch.set_num_threads(1)


def _slowness(stage: QuantizeStage) -> float:
    """Seconds of a fit beside those of GPTQ, roughly."""
    if isinstance(stage.format, TrellisFormat):
        return 100.0
    return 1.0 if stage.method == "gptq" else 10.0


def _fit(pair: tuple[str, str]) -> None:
    layer, base = pair
    shop = _WORK["workshop"]
    key = shop.key(layer, base)
    if shop.fitted.find(key) is None:
        alone = replace(shop.portfolio, bases={base: shop.portfolio.bases[base]})
        fits = fit_bases(shop.weights[layer], shop.stats[layer], alone, dtype=shop.dtype)
        if base in fits.bases:  # else it does not fit the shape, which the curves note
            shop.fitted.add(key, fits.bases[base].term, {})


def _fits(layer: str) -> LayerFits:
    shop = _WORK["workshop"]
    known = shop.known(layer, shop.portfolio.bases)
    return fit_bases(shop.weights[layer], shop.stats[layer], shop.portfolio, dtype=shop.dtype, known=known)


def _curves(names: Sequence[str]) -> tuple[str, LayerCurves]:
    (layer,) = names
    return layer, curves_of(_fits(layer))


def _shared(group: tuple[Sequence[str], Sequence[LayerCurves]]) -> list[tuple[str, LayerCurves]]:
    names, curves = group
    return list(zip(names, with_shared([_fits(name) for name in names], curves), strict=True))


def _make(part: _Part) -> tuple[_Part, list[tuple[str, int, float, float, Any]]]:
    names, choice = part
    shop = _WORK["workshop"]
    weights, stats = [shop.weights[n] for n in names], [shop.stats[n] for n in names]
    recipe, _ = served_by(shop.portfolio.recipe(choice, shop.dtype), (weights[0].shape[0], weights[0].shape[1]))
    if choice.shared:
        found = decompose_shared(weights, recipe.stages, stats)
    else:
        term = shop.known(names[0], [choice.base]).get(choice.base)
        stages = recipe.stages if term is None else (GivenStage(term), *recipe.stages[1:])
        found = [decompose_by(weights[0], replace(recipe, stages=stages), stats[0])]
    rows = []
    for name, each in zip(names, found, strict=True):
        report, matrix = each.report, each.operator.to_dense().float().numpy()
        nats, heldout = float(report.predicted_nats or 0), float(report.heldout_relative_error or 0)
        rows.append((name, report.storage_bits, nats, heldout, matrix))
    return part, rows
