"""One base of a portfolio: how a layer is quantized before low-rank terms, as data that travels in plan files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tnc.decompose import DenseStage, InputRotation, MpoStage, OutputRotation, QuantizeStage, Stage, Transform
from tnc.errors import BudgetError, TNCError
from tnc.formats import NumberFormat, TrellisFormat, format_from_spec, number_format


@dataclass(frozen=True)
class Base:
    """One base of a portfolio.

    Attributes:
        stage: how it is fitted; ``None`` stores nothing (a low-rank term alone).
        compensated: whether low-rank terms on top of it are tried.
        transforms: changes of basis around base and low-rank term, the first outermost.
    """

    stage: Stage | None
    compensated: bool = True
    transforms: tuple[Transform, ...] = ()


def named_base(name: str, method: str, refine: int, transforms: tuple[Transform, ...]) -> Base:
    """A base of a named format; a trellis codes whole lines, so it takes feedback in one sweep and no refinement.

    Down columns it takes GPTQ's. With ``method="yaqa"``, or along anti-diagonals by its name, it takes that of both
    sides, for which its lines have to be anti-diagonals (`tnc.quant.rings`).
    """
    format = number_format(name)
    if isinstance(format, TrellisFormat):
        both = method == "yaqa" or format.path == "diagonal"
        stage = QuantizeStage(replace(format, path="diagonal"), method="yaqa") if both else QuantizeStage(format)
        return Base(stage, transforms=(InputRotation(), OutputRotation()))
    return Base(QuantizeStage(format, method=method, refine=refine), transforms=transforms)


_TRANSFORMS: dict[str, type[InputRotation] | type[OutputRotation]] = {
    "input_rotation": InputRotation, "output_rotation": OutputRotation,
}  # fmt: skip


def base_to_json(name: str, base: Base) -> dict[str, Any]:
    """Description of a base; `BudgetError` for a stage or transform that a file cannot describe."""
    stage = base.stage
    shared = {"compensated": base.compensated, "transforms": [_transform_to_json(name, t) for t in base.transforms]}
    if stage is None:
        return {"stage": "none", **shared}
    if isinstance(stage, DenseStage) and stage.dtype is None:
        return {"stage": "dense", **shared}
    if isinstance(stage, QuantizeStage):
        return {
            "stage": "quantize", "method": stage.method, "format": format_to_json(stage.format),
            "options": dict(stage.options), "clip_ratios": list(stage.clip_ratios), "damping": stage.damping,
            "refine": stage.refine, **shared,
        }  # fmt: skip
    if isinstance(stage, MpoStage) and stage == _plain_mpo(stage):
        format = stage.core_format if isinstance(stage.core_format, NumberFormat) else None
        return {
            "stage": "mpo", "rank": stage.rank, "cores": stage.cores, "sweeps": stage.sweeps,
            "format": format_to_json(format), "method": stage.core_method, **shared,
        }  # fmt: skip
    raise BudgetError(
        f"base {name!r} is a {type(stage).__name__}, which a plan file cannot describe; expected None, DenseStage(), a "
        "QuantizeStage, or an MpoStage of one bond dimension, balanced modes and at most one core format."
    )


def _plain_mpo(stage: MpoStage) -> MpoStage | None:
    """What a file says of a matrix product operator; ``None`` where that is not all of it."""
    if not isinstance(stage.rank, int) or not isinstance(stage.core_format, NumberFormat | None):
        return None
    return MpoStage(stage.rank, stage.cores, sweeps=stage.sweeps, core_format=stage.core_format,
                    core_method=stage.core_method)  # fmt: skip


def base_from_json(name: str, fields: Mapping[str, Any]) -> Base:
    """Inverse of `base_to_json`; `BudgetError` for what this version does not know, naming the entry."""
    kind = fields.get("stage")
    shared = (bool(fields.get("compensated", True)),
              tuple(_transform_from_json(name, each) for each in fields.get("transforms", ())))  # fmt: skip
    if kind == "none":
        return Base(None, *shared)
    if kind == "dense":
        return Base(DenseStage(), *shared)
    if kind == "quantize":
        format = format_from_json(name, fields["format"])
        if format is None:
            raise BudgetError(f"base {name!r} has no number format; expected for example int, bits 4, group_size 64.")
        given = {k: fields[k] for k in ("method", "options", "damping", "refine") if k in fields}
        if "clip_ratios" in fields:
            given["clip_ratios"] = tuple(fields["clip_ratios"])
        return Base(QuantizeStage(format, **given), *shared)
    if kind == "mpo":
        format = format_from_json(name, fields["format"])
        sizes = int(fields["rank"]), int(fields["cores"])
        return Base(MpoStage(*sizes, sweeps=int(fields["sweeps"]), core_format=format, core_method=fields["method"]),
                    *shared)  # fmt: skip
    raise BudgetError(f"base {name!r} has the stage {kind!r}; this version of tnc knows none, dense, quantize and mpo.")


def _transform_to_json(name: str, transform: Transform) -> dict[str, Any]:
    for kind, cls in _TRANSFORMS.items():
        if type(transform) is cls:
            return {"type": kind, **asdict(transform)}
    raise BudgetError(
        f"base {name!r} has the transform {type(transform).__name__}, which a plan file cannot describe; expected "
        f"{', '.join(cls.__name__ for cls in _TRANSFORMS.values())}."
    )


def _transform_from_json(name: str, fields: Mapping[str, Any]) -> Transform:
    cls = _TRANSFORMS.get(fields.get("type", ""))
    if cls is None:
        raise BudgetError(
            f"base {name!r} has the transform {dict(fields)}; this version knows {', '.join(_TRANSFORMS)}."
        )
    return cls(**{k: v for k, v in fields.items() if k != "type"})


def format_to_json(format: NumberFormat | None) -> dict[str, Any] | None:
    """Description of a number format; ``None`` is the dtype of the model."""
    return None if format is None else format.spec()


def format_from_json(name: str, fields: Mapping[str, Any] | None) -> NumberFormat | None:
    """Inverse of `format_to_json`; `BudgetError` names the entry."""
    try:
        return None if fields is None else format_from_spec(fields)
    except TNCError as error:
        raise BudgetError(f"entry {name!r}: {error}") from error
