"""The report of a whole compressed model: the layers' certificates and their totals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tnc.errors import ModelError
from tnc.modules import FactoredLinear
from tnc.ties import distinct_bits

_MEANS = ("relative_error", "heldout_relative_error", "lower_bound")
_SUMS = ("predicted_nats", "seconds")


@dataclass(frozen=True)
class ModelReport:
    """Totals over the compressed layers of a model, and the layers' own reports.

    Attributes:
        recipe: one line, name and options.
        bits_per_weight: all stored bits of the compressed layers over their dense elements.
        linear_bytes: stored bytes of the compressed layers.
        relative_error, heldout_relative_error, lower_bound: means over layers of the layers' relative errors.
        predicted_nats: sum over layers: predicted KL to the dense model, nats per token; ``None`` without gradients.
        seconds: decomposition time, summed over layers.
        layers: name -> fields of `tnc.LayerReport`.
    """

    recipe: str
    bits_per_weight: float
    linear_bytes: int
    relative_error: float
    heldout_relative_error: float | None
    lower_bound: float
    predicted_nats: float | None
    seconds: float
    layers: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> ModelReport:
        """Collect the reports that `compress` left on the layers.

        Raises:
            ModelError: if the model holds no compressed layer with a report.
        """
        found = {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear) and m.report}
        if not found:
            raise ModelError("the model holds no compressed layer with a report; pass the result of tnc.compress.")
        layers: dict[str, dict[str, Any]] = {name: dict(module.report or {}) for name, module in found.items()}
        bits = distinct_bits(found.values())
        elements = sum(m.in_features * m.out_features for m in found.values())
        totals = {key: _total(layers, key, mean=True) for key in _MEANS}
        totals |= {key: _total(layers, key, mean=False) for key in _SUMS}
        return cls(
            recipe=str(getattr(model, "tnc_recipe", "")), bits_per_weight=bits / elements, linear_bytes=bits // 8,
            layers=layers, **totals,  # type: ignore[arg-type]
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields, the layers last."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _total(layers: dict[str, dict[str, Any]], key: str, *, mean: bool) -> float | None:
    values = [layer[key] for layer in layers.values()]
    if any(v is None for v in values):
        return None
    total = float(sum(values))
    return total / len(values) if mean else total
