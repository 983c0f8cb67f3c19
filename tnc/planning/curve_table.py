"""The error curves of a whole model, and their file: one safetensors beside the statistics.

Planning from them touches neither weights nor statistics, so any number of budgets costs a solver run each. The
fingerprint of what they were measured on travels with them: curves of another model, calibration or portfolio are
refused, never used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tnc.errors import BudgetError
from tnc.planning.curves import ErrorCurve, LayerCurves, Option
from tnc.planning.portfolio import Choice, Portfolio

FORMAT_VERSION = "2"
_MEASURES = ("nats", "heldout_nats", "error", "heldout_error")


@dataclass(frozen=True, eq=False)
class CurveTable:
    """Error curves of all layers that are planned.

    Attributes:
        layers: by name, in model order.
        portfolio: what was tried.
        groups: names of layers that see one input (q, k and v; gate and up), each of at least two.
        other_bytes: bytes of all other tensors of the checkpoint.
        dtype: of plain factors and dense layers, for example ``"bfloat16"``.
        fingerprint: digest of the weights, statistics and portfolio behind the curves.
    """

    layers: Mapping[str, LayerCurves]
    portfolio: Portfolio
    groups: tuple[tuple[str, ...], ...]
    other_bytes: int
    dtype: str
    fingerprint: str

    @property
    def elements(self) -> int:
        """Dense elements of all layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, under its name only once it is complete; an older one is replaced.

        Raises:
            BudgetError: if it cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            save_file(_tensors(self), partial, metadata=_metadata(self))
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise BudgetError(f"error curves cannot be written to {target}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, fingerprint: str | None = None) -> CurveTable:
        """Read a file of `save`.

        Args:
            path: of the file.
            fingerprint: of the model, statistics and portfolio at hand; ``None`` does not compare.

        Raises:
            BudgetError: if the file is missing or damaged, of a newer version, or measured on something else.
        """
        source = Path(path)
        if not source.is_file():
            raise BudgetError(f"there are no error curves at {source}; measure them with tnc.error_curves(...).save.")
        try:
            with safe_open(source, framework="pt") as file:
                notes = file.metadata() or {}
                columns = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118  no mapping
            _check_version(source, notes)
            found = _rebuild(notes, columns)
        except (SafetensorError, OSError, KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, BudgetError):
                raise
            raise BudgetError(f"error curves {source} are damaged ({error!r}); remove the file.") from error
        if fingerprint is not None and fingerprint != found.fingerprint:
            raise BudgetError(
                f"error curves {source} are stale: they were measured on other weights, statistics or another "
                f"portfolio (fingerprint {found.fingerprint[:12]}, now {fingerprint[:12]}). Remove the file to measure "
                "again, or name another one."
            )
        return found


def _tensors(table: CurveTable) -> dict[str, torch.Tensor]:
    bases, factors = list(table.portfolio.bases), table.portfolio.factor_names
    rows = [
        (at, bases.index(o.choice.base), factors.index(o.choice.factors), o.choice.rank, o.choice.shared, o.bits)
        for at, layer in enumerate(table.layers.values()) for o in layer.options
    ]  # fmt: skip
    measures = [[getattr(o, key) for key in _MEASURES] for layer in table.layers.values() for o in layer.options]
    return {
        "options": torch.tensor(rows, dtype=torch.int64).reshape(-1, 6),
        "measures": torch.tensor(measures, dtype=torch.float64).reshape(-1, len(_MEASURES)),
    }


def _metadata(table: CurveTable) -> dict[str, str]:
    layers = [{"name": n, "shape": c.shape, "notes": c.notes} for n, c in table.layers.items()]
    fields = {"layers": layers, "portfolio": table.portfolio.to_json(), "groups": table.groups,
              "other_bytes": table.other_bytes, "dtype": table.dtype, "fingerprint": table.fingerprint}  # fmt: skip
    return {"tnc_format": "error curves", "tnc_version": FORMAT_VERSION, "fields": json.dumps(fields)}


def _check_version(source: Path, notes: Mapping[str, str]) -> None:
    kind, version = notes.get("tnc_format"), notes.get("tnc_version")
    if kind != "error curves" or version != FORMAT_VERSION:
        raise BudgetError(
            f"{source} holds {kind or 'something else'}, version {version}; expected error curves of version "
            f"{FORMAT_VERSION}. Remove the file, or upgrade tnc."
        )


def _rebuild(notes: Mapping[str, str], columns: Mapping[str, list[list[float]]]) -> CurveTable:
    fields = json.loads(notes["fields"])
    portfolio = Portfolio.from_json(fields["portfolio"])
    bases, factors = list(portfolio.bases), portfolio.factor_names
    known: dict[Choice, Choice] = {}  # most layers have the same ones
    by_layer: list[dict[tuple[str, str, bool], list[Option]]] = [{} for _ in fields["layers"]]
    for (at, base, factor, rank, shared, bits), measures in zip(columns["options"], columns["measures"], strict=True):
        choice = Choice(bases[int(base)], int(rank), factors[int(factor)], bool(shared))
        choice = known.setdefault(choice, choice)
        option = Option(choice, int(bits), *measures)
        by_layer[int(at)].setdefault((choice.base, choice.factors, choice.shared), []).append(option)
    layers = {
        each["name"]: LayerCurves(
            (each["shape"][0], each["shape"][1]),
            tuple(ErrorCurve(base, factor, tuple(o), shared) for (base, factor, shared), o in curves.items()),
            tuple(each["notes"]),
        )
        for each, curves in zip(fields["layers"], by_layer, strict=True)
    }
    groups = tuple(tuple(group) for group in fields["groups"])
    return CurveTable(layers, portfolio, groups, fields["other_bytes"], fields["dtype"], fields["fingerprint"])
