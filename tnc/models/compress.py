"""The driver: calibrate, decompose and swap the linear layers of a model, one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from glob import escape
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tnc.checkpoint import Journal
from tnc.checkpoint.journal import Record, digest
from tnc.decompose import Decomposition, DenseStage, GivenStage, Recipe, decompose
from tnc.decompose.best import decompose_by
from tnc.decompose.dense_target import DenseTarget
from tnc.decompose.shared import decompose_shared
from tnc.errors import ModelError, StatsError
from tnc.models.calibrate import Batch, calibrate, iter_block_stats
from tnc.models.layers import select_layers, weight_of
from tnc.models.round_blocks import not_rounded, round_blocks
from tnc.models.sharing import input_groups, sharing_groups
from tnc.models.uniform import Uniform
from tnc.models.useful_ranks import forces_rank, served_by
from tnc.modules import FactoredLinear
from tnc.siblings import join_siblings
from tnc.stats import LayerStats
from tnc.terms import Expression, map_tensors
from tnc.ties import share_tensors

Progress = Callable[[str, int, int], None]


class Chooser(Protocol):
    """What decides the recipe of each layer, block by block: a `Plan`, or something that plans on the way."""

    @property
    def names(self) -> tuple[str, ...]:
        """The layers it decides; others stay as they are."""

    def describe(self) -> str:
        """One line, for the report."""

    def check_layers(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise unless the model has the layers."""

    def recipes_of(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats | None], dtype: torch.dtype | None
    ) -> Mapping[str, Recipe]:
        """Recipes of the layers whose statistics have just become known."""

    def check_layer(self, name: str, report: Mapping[str, Any]) -> None:
        """Raise if a finished layer breaks what was promised."""


def compress(
    model: nn.Module, recipe: Recipe | Chooser, batches: Iterable[Batch] | None = None, *,
    stats: Mapping[str, LayerStats] | None = None, fisher: bool = True, heldout_share: float = 0.1,
    sequential: bool = False, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None,
    dtype: torch.dtype | None = None, seed: int = 0, backend: str = "auto", inplace: bool = False,
    progress: Progress | None = None, journal: Journal | None = None, bases: Mapping[str, Expression] | None = None,
) -> nn.Module:  # fmt: skip
    """Compress the linear layers of a model's blocks; embeddings, norms and the head stay as they are.

    Args:
        model: a Hugging Face causal LM, or any module with ``nn.Linear`` or ``Conv1D`` layers. Fused experts stay
            dense unless `tnc.unfuse_experts` made layers of them.
        recipe: from `tnc.recipe`, your own `Recipe`, or a `tnc.Plan`, which names the layers itself.
        batches: token ids (B, T), or dicts with ``input_ids`` and ``attention_mask``. Without batches and
            statistics only data-free recipes run (``svd``, ``rtn``, ``lorc``).
        stats: statistics from `calibrate`, used instead of ``batches``.
        fisher: calibrate G too, so that reports are in nats; costs a backward pass.
        heldout_share: share of the sequences kept out of H and G, for the held-out error.
        sequential: later blocks see the compressed earlier ones; otherwise the dense ones. Recipes that aim at the
            dense outputs (`DenseTarget`, as ``gptaq``) then get both inputs.
        include: glob patterns of layer names; ``None`` is all layers of the blocks.
        exclude: glob patterns of layer names left dense.
        dtype: of stored factors; ``None`` is the dtype of the weight.
        seed: of the sampled labels.
        backend: kernel of the new layers, see `FactoredLinear`.
        inplace: change ``model`` itself and save its memory; otherwise it is copied and left untouched.
        progress: called with (stage, done, total).
        journal: keeps every finished layer; a run that was killed takes the layers it finds there and decomposes
            the others only. Calibration is repeated unless ``stats`` are given.
        bases: layer name to a term that stays as it is and that the stages add to, as `tnc.load_base` reads them;
            layers without one stay dense.

    Returns:
        The model with `FactoredLinear` layers, each with a ``report``; `ModelReport.of` collects them. Layers that
        calibration saw with one input are siblings (`tnc.siblings`) and compute what they have in common once.

    Raises:
        ModelError, StatsError, NonFiniteError, FormatError, RankError, BudgetError: before any layer of the
            returned model is visible to the caller; without ``inplace`` nothing is lost.

    Memory: with batches, activations and statistics of one block at a time (all layers' for pooled recipes).
    """
    pooled = isinstance(recipe, Recipe) and recipe.pooled is not None
    if sequential and (stats is not None or pooled):
        raise StatsError(
            "sequential=True calibrates each block behind the compressed ones, so it takes batches and a recipe "
            "that is not pooled; leave out stats, or sequential."
        )
    steps = recipe.block_steps if isinstance(recipe, Recipe) else 0
    teacher = copy.deepcopy(model) if inplace and steps else model
    batches = list(batches) if steps and batches is not None else batches
    target = model if inplace else copy.deepcopy(model)
    layers = select_layers(target, include, exclude)
    if bases is not None:
        include, exclude = _with_base(layers, bases), None
        layers = {name: layers[name] for name in include}
    chooser = Uniform(recipe, tuple(layers)) if isinstance(recipe, Recipe) else recipe
    chooser.check_layers({name: tuple(weight_of(layer).shape) for name, layer in layers.items()})
    if not isinstance(recipe, Recipe):
        layers = {name: layers[name] for name in recipe.names}
        include, exclude = [escape(name) for name in layers], None
    options: dict[str, Any] = {
        "fisher": fisher, "heldout_share": heldout_share, "include": include, "exclude": exclude, "seed": seed,
        "progress": progress,
    }  # fmt: skip
    if pooled and stats is None:
        stats = calibrate(target, batches or (), **options)
    options |= {"sequential": sequential, "asymmetric": sequential and _aims_at_dense(recipe)}
    groups = _groups(target, layers, batches, stats, options)
    done, siblings = 0, []
    for group in groups:
        siblings += input_groups(group)
        weights = {name: weight_of(layers[name]).detach() for name in group}
        recipes = chooser.recipes_of(weights, group, dtype)
        for names in sharing_groups(recipes, group) if bases is None else [[name] for name in group]:
            if len(names) > 1:
                shared = recipes[names[0]]
                found = _decomposed_together([weights[n] for n in names], shared, [group[n] for n in names])
            else:
                asked = recipes[names[0]] if bases is None else _on_base(recipes[names[0]], bases[names[0]])
                found = [_finished(weights[names[0]], asked, group[names[0]], dtype, journal)]
            for name, each in zip(names, found, strict=True):
                chooser.check_layer(name, each.report)
                _swap(target, name, layers[name], each, backend)
                done += 1
                if progress is not None:
                    progress("compress", done, len(layers))
            share_tensors([target.get_submodule(n) for n in names], [each.operator for each in found])  # type: ignore[misc]
    if steps:
        _round_blocks(target, batches, teacher, stats, steps, seed, progress)
    join_siblings(target, siblings)
    target.tnc_recipe = recipe.describe()  # type: ignore[assignment]
    return target


def _round_blocks(
    model: nn.Module, batches: Iterable[Batch] | None, teacher: nn.Module, stats: Mapping[str, LayerStats] | None,
    steps: int, seed: int, progress: Progress | None,
) -> None:  # fmt: skip
    """Codes learnt against the blocks' outputs, or a note in every report that there was no text for it."""
    if batches is not None:
        round_blocks(model, batches, teacher=teacher, stats=stats, steps=steps, seed=seed, progress=progress)
        return
    for module in model.modules():
        if isinstance(module, FactoredLinear) and module.report is not None:
            module.report = not_rounded(module.report)


def _aims_at_dense(recipe: Recipe | Chooser) -> bool:
    return isinstance(recipe, Recipe) and any(isinstance(each, DenseTarget) for each in recipe.transforms)


def _with_base(layers: Mapping[str, nn.Module], bases: Mapping[str, Expression]) -> list[str]:
    found = [name for name in layers if name in bases]
    if not found:
        raise ModelError(
            f"none of the {len(layers)} selected layers has a base; there are bases of {', '.join(list(bases)[:3])}. "
            "Pass the dense model that the bases were made from."
        )
    return found


def _on_base(recipe: Recipe, base: Expression) -> Recipe:
    return replace(recipe, stages=(GivenStage(base), *recipe.stages))


def _groups(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch] | None,
    stats: Mapping[str, LayerStats] | None, options: dict[str, Any],
) -> Iterator[Mapping[str, LayerStats | None]]:  # fmt: skip
    """Layer statistics in the order in which they become known: all at once, or block by block."""
    if stats is not None:
        missing = [name for name in layers if name not in stats]
        if missing:
            raise StatsError(
                f"the statistics lack {len(missing)} of {len(layers)} layers, the first is {missing[0]!r}; "
                "calibrate this model again, or exclude those layers."
            )
        yield {name: stats[name] for name in layers}
    elif batches is None:
        yield dict.fromkeys(layers)
    else:
        for _, group in iter_block_stats(model, batches, **options):
            yield group


def _finished(
    weight: Tensor, recipe: Recipe, stats: LayerStats | None, dtype: torch.dtype | None, journal: Journal | None
) -> Record:  # fmt: skip
    """The decomposed layer: from the journal if it is there, else computed and recorded."""
    if journal is None:
        return _decomposed(weight, recipe, stats, dtype)
    fitted_by = repr(
        (recipe.stages, recipe.sweeps, recipe.transforms, recipe.candidates, recipe.limit, recipe.margin, dtype)
    )
    given = [t for s in recipe.stages if isinstance(s, GivenStage) for t in s.term.tensors().values()]
    key = digest([version("tnc"), fitted_by, weight, *_moments(stats), *given])
    record = journal.find(key)
    if record is None:
        record = _decomposed(weight, recipe, stats, dtype)
        journal.add(key, record.operator, record.report)
        return record
    return Record(map_tensors(record.operator, lambda t: t.to(weight.device)), record.report)


def _decomposed(weight: Tensor, recipe: Recipe, stats: LayerStats | None, dtype: torch.dtype | None) -> Record:
    served, notes = served_by(recipe, (weight.shape[0], weight.shape[1]))
    found = decompose_by(weight, served, stats)
    if found.operator.storage_bits > _dense_bits(weight, dtype) and not forces_rank(recipe):
        found = _kept_dense(weight, found, stats, dtype)
    report = replace(found.report, fallbacks=notes + found.report.fallbacks)
    return Record(found.operator, report.to_json())


def _decomposed_together(weights: Sequence[Tensor], recipe: Recipe, stats: Sequence[LayerStats | None]) -> list[Record]:
    """Layers with the same inputs, with one right factor; they are not in the journal."""
    known = [each for each in stats if each is not None]
    served, notes = served_by(recipe, (sum(len(w) for w in weights), weights[0].shape[1]))
    found = decompose_shared(weights, served.stages, known, sweeps=served.sweeps)
    reports = [replace(each.report, fallbacks=notes + each.report.fallbacks) for each in found]
    return [Record(each.operator, report.to_json()) for each, report in zip(found, reports, strict=True)]


def _moments(stats: LayerStats | None) -> Iterator[Tensor | str | None]:
    """Everything a decomposition can see of the statistics."""
    for moments in () if stats is None else (stats.inputs, stats.heldout, stats.gradient):
        yield from (
            (None,) if moments is None else (moments.second, moments.mean_abs, str(moments.tokens), moments.cross)
        )


def _swap(model: nn.Module, name: str, layer: nn.Module, found: Record, backend: str) -> None:
    """Put the factored module in the place of a layer."""
    module = FactoredLinear.from_linear(layer, found.operator, backend=backend)
    module.report = found.report
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _dense_bits(weight: Tensor, dtype: torch.dtype | None) -> int:
    return weight.numel() * (dtype or weight.dtype).itemsize * 8


def _kept_dense(
    weight: Tensor, found: Decomposition, stats: LayerStats | None, dtype: torch.dtype | None
) -> Decomposition:
    """The dense layer in place of a form that would store more bits, with a note that says so."""
    asked, dense_bits = found.operator.storage_bits, _dense_bits(weight, dtype)
    note = f"kept dense: the form asked for stores {asked} bits, dense {dense_bits}"
    dense = decompose(weight, (DenseStage(dtype),), stats)
    return Decomposition(dense.operator, replace(dense.report, fallbacks=(note,)))
