"""A model decomposed by several recipes at once, a process a layer; every model as soon as it is whole."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tnc import LayerStats, Recipe, compress
from tnc.errors import TNCError
from tnc.models.layers import select_layers, weight_of
from tnc.models.pooling import at_rank, pooled_layer
from tnc.modules import FactoredLinear
from tnc.planning import PooledBonds, PooledLayer, pooled_ranks
from tnc.terms import from_spec, map_tensors

DTYPE = torch.float16  # of stored factors

_WORK: dict[str, Any] = {}  # weights and statistics, inherited by the processes

Made = tuple[Any, dict[str, Any], dict[str, Any]]
"""Specification, tensors and report of one layer; arrays, because tensors do not travel between processes."""


def decomposed(
    recipes: Mapping[int, Recipe], dense: nn.Module, stats: Mapping[str, LayerStats], *, jobs: int, backend: str
) -> Iterator[tuple[int, nn.Module]]:
    """The model of every recipe with its key, in the order in which they become whole.

    The first recipes are begun first, the largest layers of each before the others, in processes that make way for
    this one. A recipe that one of the layers cannot have is left out, with a line that says why.
    """
    _WORK.update(stats=stats, weights={
        name: weight_of(layer).detach().cpu().clone() for name, layer in select_layers(dense).items()
    })  # fmt: skip
    layers = sorted(_WORK["weights"], key=lambda name: -_WORK["weights"][name].numel())
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _aside) as pool:
        rows = [_Row(key, recipe, layers, pool) for key, recipe in recipes.items()]
        owner = {future: row for row in rows for future in row.begin()}
        while owner:
            for future in wait(owner, return_when=FIRST_COMPLETED).done:
                row = owner.pop(future)
                owner.update(dict.fromkeys(row.take(future.result()), row))
                if len(row.made) == len(layers):
                    yield row.key, _assembled(dense, row.made, backend)
                    row.made = {}


@dataclass
class _Row:
    """One recipe: what is known of its layers; under a pooled budget first their curves, then what they get."""

    key: int
    recipe: Recipe
    layers: list[str]
    pool: ProcessPoolExecutor
    curves: dict[str, PooledLayer | PooledBonds] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    refused: bool = False

    def begin(self) -> list[Future[Any]]:
        """The first jobs."""
        if self.recipe.pooled is not None:
            return [self.pool.submit(_curve, self.recipe, layer) for layer in self.layers]
        return [self.pool.submit(_decomposed, self.recipe, layer) for layer in self.layers]

    def take(self, result: tuple[str, Any]) -> list[Future[Any]]:
        """Keep what a job found, and start those that waited for it."""
        layer, found = result
        if isinstance(found, PooledLayer | PooledBonds):
            self.curves[layer] = found
            return self._pooled() if len(self.curves) == len(self.layers) else []
        if not isinstance(found, str):
            self.made[layer] = found
        elif not self.refused:
            print(f"{self.recipe.name} left out: {layer}: {found}", flush=True)
            self.refused = True
        return []

    def _pooled(self) -> list[Future[Any]]:
        assert self.recipe.pooled is not None
        ranks = pooled_ranks({layer: self.curves[layer] for layer in _WORK["weights"]}, self.recipe.pooled.value).ranks
        served = {layer: at_rank(self.recipe, ranks[layer], DTYPE) for layer in self.layers}
        return [self.pool.submit(_decomposed, recipe, layer) for layer, recipe in served.items()]


def _aside() -> None:
    torch.set_num_threads(1)
    os.nice(5)


def _curve(recipe: Recipe, layer: str) -> tuple[str, PooledLayer | PooledBonds]:
    return layer, pooled_layer(recipe, _WORK["weights"][layer], _WORK["stats"][layer], DTYPE)


def _decomposed(recipe: Recipe, layer: str) -> tuple[str, Made | str]:
    weight = _WORK["weights"][layer]
    alone = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)})
    weight_of(alone["layer"]).data.copy_(weight)
    try:
        compress(alone, recipe, stats={"layer": _WORK["stats"][layer]}, dtype=DTYPE, inplace=True)
    except TNCError as error:  # blocks may not divide a small layer
        return layer, str(error)
    made = alone["layer"]
    assert isinstance(made, FactoredLinear) and made.report is not None
    tensors = {name: tensor.detach().numpy() for name, tensor in made.operator.tensors().items()}
    return layer, (made.operator.spec(), tensors, made.report)


def _assembled(dense: nn.Module, made: Mapping[str, Made], backend: str) -> nn.Module:
    small, device = copy.deepcopy(dense), next(dense.parameters()).device
    for name, (spec, arrays, report) in made.items():
        operator = from_spec(spec, {key: torch.from_numpy(array) for key, array in arrays.items()})
        operator = map_tensors(operator, lambda t: t.to(device))
        module = FactoredLinear.from_linear(small.get_submodule(name), operator, backend=backend)
        module.report = report
        parent, _, child = name.rpartition(".")
        setattr(small.get_submodule(parent), child, module)
    return small
