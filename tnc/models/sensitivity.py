"""How much each layer of a model suffers from each size of a form: error, predicted nats, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from tnc.decompose import Size, Stage, decompose
from tnc.errors import BudgetError, RankError, StatsError
from tnc.models.evaluate import Evaluation, evaluate_many
from tnc.models.layer_scores import variant
from tnc.models.layers import select_layers, weight_of
from tnc.modules import FactoredLinear
from tnc.stats import LayerStats
from tnc.terms import Expression


@dataclass(frozen=True)
class SensitivityRow:
    """One layer at one size; errors as in `LayerReport`, ``None`` where the layer cannot have that size.

    ``kl`` and ``delta_nats`` are measured, as in `Evaluation`, with this layer alone replaced; ``None`` without a text.
    """

    layer: str
    size: str
    bits_per_weight: float | None
    relative_error: float | None
    heldout_relative_error: float | None
    predicted_nats: float | None
    kl: float | None = None
    delta_nats: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """The profile of a model.

    Attributes:
        layers: names, in model order.
        sizes: labels, in the order asked.
        rows: layer by layer, size by size.
    """

    layers: tuple[str, ...]
    sizes: tuple[str, ...]
    rows: tuple[SensitivityRow, ...]

    def grid(self, field: str) -> list[list[float | None]]:
        """One field of the rows as layers × sizes."""
        values = iter(getattr(row, field) for row in self.rows)
        return [[next(values) for _ in self.sizes] for _ in self.layers]

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {"layers": list(self.layers), "sizes": list(self.sizes), "rows": [asdict(row) for row in self.rows]}


def sensitivity(
    model: nn.Module, stats: Mapping[str, LayerStats], stage: Callable[[Size], Stage], sizes: Sequence[Size], *,
    include: Iterable[str] | None = None, exclude: Iterable[str] | None = None, windows: Sequence[Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Sensitivity:  # fmt: skip
    """Decompose every layer at every size, each alone; nothing of the model changes.

    Args:
        model: dense, as for `tnc.compress`.
        stats: of every layer, from `tnc.calibrate`; with gradients the profile is in nats too.
        stage: the form at a size: ``LowRankStage``, ``MpoStage``, ``partial(FormStage, form)``.
        sizes: ranks, bond dimensions or `BitsPerWeight`.
        include: glob patterns of layer names; ``None`` is all layers of the blocks.
        exclude: glob patterns of layers to leave out.
        windows: of a held-out text, (tokens,) each, on which what every layer loses is measured too.
        progress: called with (phase, done, total).

    Raises:
        StatsError: if a layer has no statistics.
        TextError, ModelError: as `evaluate`, where there are windows.

    Cost: one decomposition for each layer and size; with windows a pass over them for each, and one for each layer.
    """
    layers = select_layers(model, include, exclude)
    missing = [name for name in layers if name not in stats]
    if missing:
        raise StatsError(f"the statistics lack {len(missing)} of {len(layers)} layers, the first is {missing[0]!r}.")
    rows: list[SensitivityRow] = []
    for name, layer in layers.items():
        found = [_row(name, layer, stats[name], stage(size), size) for size in sizes]
        scores = {} if windows is None else _scores(model, name, layer, [operator for _, operator in found], windows)
        for place, (row, _) in enumerate(found):
            measured = scores.get(str(place))
            rows.append(row if measured is None else replace(row, kl=measured.kl, delta_nats=measured.delta_nats))
        if progress is not None:
            progress("sensitivity", len(rows), len(layers) * len(sizes))
    return Sensitivity(tuple(layers), tuple(map(label, sizes)), tuple(rows))


def label(size: Size) -> str:
    """A size in few words: ``64`` or ``BitsPerWeight 8``."""
    return f"{size}" if isinstance(size, int) else f"{type(size).__name__} {size.value:g}"


def _row(
    name: str, layer: nn.Module, stats: LayerStats, stage: Stage, size: Size
) -> tuple[SensitivityRow, Expression | None]:
    """The row, and what stands for the layer."""
    try:
        found = decompose(weight_of(layer).detach(), (stage,), stats)
    except (RankError, BudgetError):
        return SensitivityRow(name, label(size), None, None, None, None), None
    report = found.report
    row = SensitivityRow(
        name, label(size), report.bits_per_weight, report.relative_error, report.heldout_relative_error,
        report.predicted_nats,
    )  # fmt: skip
    return row, found.operator


def _scores(
    model: nn.Module, name: str, layer: nn.Module, operators: Sequence[Expression | None], windows: Sequence[Tensor]
) -> dict[str, Evaluation]:
    """Of the model with each operator in turn in the place of the layer, by its place in the list."""
    known = {str(place): operator for place, operator in enumerate(operators) if operator is not None}
    modules = {key: FactoredLinear.from_linear(layer, each, backend="reference") for key, each in known.items()}
    variants = {key: variant(model, [name], {name: module}.__getitem__) for key, module in modules.items()}
    return evaluate_many(variants, windows, reference=model) if variants else {}
