"""`Plan`: what every layer becomes, why, and what it is predicted to cost; a file that people read and edit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnc.decompose import Recipe, RelativeError
from tnc.errors import BudgetError, ModelError
from tnc.planning.budget import Budget, describe_budget, parse_budget
from tnc.planning.portfolio import Choice, Portfolio
from tnc.stats import LayerStats

FORMAT_VERSION = 1
_KEPT = ("objective", "value", "lower_bound", "scale", "other_bytes", "dtype", "fingerprint", "measured")


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan.

    Attributes:
        choice: what it becomes.
        shape: (out_features, in_features).
        bits: stored bits.
        nats: predicted nats on held-out tokens, before calibration of the scale; ``None`` without gradients.
        error: relative error on held-out tokens.
        share: of the total that was minimised.
        seconds: of one call by the latency table; ``None`` without one.
        why: the runner-up, and why it lost.
        measured: KL to the dense model with this layer compressed alone, nats per token; ``None`` if not measured.
        weight: what its predicted nats were multiplied by (`tnc.planning.Rules`).
    """

    choice: Choice
    shape: tuple[int, int]
    bits: int
    nats: float | None
    error: float
    share: float
    seconds: float | None = None
    why: str = ""
    measured: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Choices for all layers of a model under one budget.

    Attributes:
        layers: by name, in model order.
        portfolio: what the names of bases and factor formats mean.
        budgets: what was asked.
        objective: ``"nats"``, or ``"relative"`` (the sum of squared relative errors, a proxy) without gradients.
        value: of the objective, over all layers.
        lower_bound: no choice within the budget has a smaller value (of bits, where bits were minimised).
        scale: measured over predicted nats; 1 where nothing was measured.
        other_bytes: bytes of everything else in the checkpoint.
        dtype: of plain factors and dense layers.
        fingerprint: of the curves it was made from.
        measured: scores of the planned model on held-out text; ``None`` where nothing was measured.
        notes: everything a reader should know.
        edited: whether choices were changed since the planner made them; set by `load`.
    """

    layers: Mapping[str, LayerPlan]
    portfolio: Portfolio
    budgets: tuple[Budget, ...]
    objective: str
    value: float
    lower_bound: float
    scale: float = 1.0
    other_bytes: int = 0
    dtype: str = "float32"
    fingerprint: str = ""
    measured: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())
    edited: bool = False

    @property
    def storage_bits(self) -> int:
        """Stored bits of all planned layers."""
        return sum(layer.bits for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over dense elements of the planned layers."""
        return self.storage_bits / sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return self.storage_bits // 8 + self.other_bytes

    @property
    def predicted_nats(self) -> float | None:
        """KL to the dense model, nats per token: the weighted sum times ``scale``; ``None`` without gradients."""
        nats = [layer.weight * layer.nats for layer in self.layers.values() if layer.nats is not None]
        return self.scale * sum(nats) if len(nats) == len(self.layers) else None

    @property
    def measured_alone(self) -> bool:
        """Whether layers were measured one by one."""
        return any(layer.measured is not None for layer in self.layers.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the planned layers."""
        return tuple(self.layers)

    def describe(self) -> str:
        """The budget on one line, as recipes are described."""
        edited = ", edited" if self.edited else ""
        return f"plan({', '.join(map(describe_budget, self.budgets))}{edited})"

    def recipes_of(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats | None], dtype: torch.dtype | None
    ) -> dict[str, Recipe]:
        """Recipes of the given layers; the statistics are not needed."""
        return {name: self.portfolio.recipe(self.layers[name].choice, dtype) for name in weights}

    def check_layers(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelError` unless the plan is of a model with these layers and shapes."""
        missing = [name for name in self.layers if name not in shapes]
        if missing:
            raise ModelError(
                f"the plan has {len(missing)} of {len(self.layers)} layers that the model lacks, the first is "
                f"{missing[0]!r}; expected a plan of this model. Plan it again."
            )
        for name, layer in self.layers.items():
            if tuple(shapes[name]) != tuple(layer.shape):
                raise ModelError(
                    f"layer {name!r} has shape {tuple(shapes[name])}; the plan was made for {tuple(layer.shape)}. Plan "
                    "this model again."
                )

    def check_layer(self, name: str, report: Mapping[str, Any]) -> None:
        """The guarantee of an error budget: raise `BudgetError` where a finished layer is above the bound asked.

        Edited plans are not held to it; `shortfalls` says so instead.
        """
        if self.edited:
            return
        for budget in self.budgets:
            error = _heldout(report)
            if isinstance(budget, RelativeError) and error > budget.value:
                raise BudgetError(
                    f"layer {name!r} has a held-out error of {error:.4g} as stored, above the {budget.value:g} asked; "
                    f"planned was {self.layers[name].error:.4g} on other statistics. Plan with the statistics of this "
                    "calibration, or ask for more."
                )

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields; the layers, which are there to be edited, last."""
        return {
            "format_version": FORMAT_VERSION, "budget": [describe_budget(each) for each in self.budgets],
            "objective": self.objective, "value": self.value, "lower_bound": self.lower_bound,
            "bits_per_weight": self.bits_per_weight, "bytes": self.bytes, "predicted_nats": self.predicted_nats,
            "scale": self.scale, "measured": None if self.measured is None else dict(self.measured),
            "other_bytes": self.other_bytes, "dtype": self.dtype, "fingerprint": self.fingerprint,
            "notes": list(self.notes), "choices_sha256": _digest(self.layers), "portfolio": self.portfolio.to_json(),
            "layers": {name: _layer_to_json(layer) for name, layer in self.layers.items()},
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``plan.json``.

        Raises:
            BudgetError: if it cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BudgetError(f"the plan cannot be written to {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan, as written or edited: ``base``, ``rank``, ``factors`` and ``shared`` of a layer may be changed.

        Raises:
            BudgetError: if the file is missing, no plan, of a newer version, or a layer names something that the
                portfolio does not have; names the layer.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise BudgetError(f"plan {path} has format_version {version}; this tnc knows {FORMAT_VERSION}.")
            return _from_json(fields)
        except OSError as error:
            raise BudgetError(f"plan {path} cannot be read: {error.strerror}. Make one with tnc plan.") from error
        except BudgetError as error:
            raise BudgetError(f"plan {path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BudgetError(
                f"{path} is no plan of tnc ({error!r}); expected the file that tnc plan writes."
            ) from error


def _from_json(fields: Mapping[str, Any]) -> Plan:
    portfolio = Portfolio.from_json(fields["portfolio"])
    layers = {name: _layer_from_json(name, each, portfolio) for name, each in fields["layers"].items()}
    kept = {k: fields[k] for k in _KEPT}
    edited = _digest(layers) != fields["choices_sha256"]
    budgets = tuple(parse_budget(each) for each in fields["budget"])
    return Plan(layers, portfolio, budgets, notes=tuple(fields["notes"]), edited=edited, **kept)


def shortfalls(plan: Plan, layers: Mapping[str, Mapping[str, Any]], *, total_bytes: int) -> tuple[str, ...]:
    """What a compressed model does not keep of the plan's budgets, one sentence each.

    Args:
        plan: as run.
        layers: reports of its layers (fields of `tnc.LayerReport`).
        total_bytes: of all tensors of the checkpoint.
    """
    bits = sum(layer["storage_bits"] for layer in layers.values())
    elements = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    nats = [layer["predicted_nats"] for layer in layers.values()]
    weights = [plan.layers[name].weight for name in layers]
    found = {
        "BitsPerWeight": bits / elements, "Bytes": total_bytes,
        "RelativeError": max((_heldout(layer) for layer in layers.values()), default=0.0),
        "Nats": None if None in nats else plan.scale * sum(w * n for w, n in zip(weights, nats, strict=True)),
    }  # fmt: skip
    notes = []
    for budget in plan.budgets:
        value = found.get(type(budget).__name__)
        if value is not None and value > float(budget.value) * (1 + 1e-9):
            notes.append(f"the budget {describe_budget(budget)} is not met: it is {value:.6g}")
    return tuple(notes)


def edit(plan: Plan, changes: Mapping[str, Choice]) -> Plan:
    """The plan with other choices for some layers; their predicted figures stay those of the old choices.

    Raises:
        BudgetError: for a layer that is not in the plan, or a choice that is not in its portfolio.
    """
    unknown = [name for name in changes if name not in plan.layers]
    if unknown:
        raise BudgetError(f"layer {unknown[0]!r} is not in the plan; expected one of its {len(plan.layers)} layers.")
    for choice in changes.values():
        plan.portfolio.check(choice)
    layers = {n: replace(each, choice=changes.get(n, each.choice)) for n, each in plan.layers.items()}
    return replace(plan, layers=layers, edited=plan.edited or _digest(layers) != _digest(plan.layers))


def _heldout(report: Mapping[str, Any]) -> float:
    error = report["heldout_relative_error"]
    return float(report["relative_error"] if error is None else error)


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    fields = asdict(layer)
    return {**fields.pop("choice"), **fields, "shape": list(layer.shape)}


def _layer_from_json(name: str, fields: Mapping[str, Any], portfolio: Portfolio) -> LayerPlan:
    choice = Choice(fields["base"], fields["rank"], fields["factors"], fields.get("shared", False))
    try:
        portfolio.check(choice)
    except BudgetError as error:
        raise BudgetError(f"layer {name!r}: {error}") from error
    limit = min(fields["shape"])
    if isinstance(choice.rank, bool) or not isinstance(choice.rank, int) or not 0 <= choice.rank <= limit:
        raise BudgetError(f"layer {name!r} has rank {choice.rank!r}; expected an integer from 0 to {limit}.")
    if not isinstance(choice.shared, bool):
        raise BudgetError(f"layer {name!r} has shared {choice.shared!r}; expected true or false.")
    rest = {k: v for k, v in fields.items() if k not in ("base", "rank", "factors", "shared", "shape")}
    return LayerPlan(choice, (fields["shape"][0], fields["shape"][1]), **rest)


def _digest(layers: Mapping[str, LayerPlan]) -> str:
    choices = [[name, *asdict(layer.choice).values()] for name, layer in layers.items()]
    return hashlib.sha256(json.dumps(choices).encode()).hexdigest()
