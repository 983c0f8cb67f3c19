"""`number_format`: formats by the names that people and command lines use."""

from __future__ import annotations

from dataclasses import replace

from tnc.errors import FormatError
from tnc.formats.integer import SUPPORTED_BITS, IntFormat
from tnc.formats.number import NumberFormat
from tnc.formats.table import TableFormat
from tnc.formats.trellis import TrellisFormat

FORMATS: dict[str, NumberFormat] = {
    **{f"int{bits}": IntFormat(bits) for bits in SUPPORTED_BITS},
    "nf4": TableFormat("nf4"),
    "nf3": TableFormat("nf3"),
    "fp4": TableFormat("e2m1"),
    "mxfp4": TableFormat("e2m1", 32, scale="e8m0"),
    "nvfp4": TableFormat("e2m1", 16, scale="e4m3"),
    "fp8_e4m3": TableFormat("e4m3", scale="float32"),
    "fp8_e5m2": TableFormat("e5m2", scale="float32"),
    "fp8_e4m3_tensor": TableFormat("e4m3", group_rows=None, scale="float32"),
    "fp8_e5m2_tensor": TableFormat("e5m2", group_rows=None, scale="float32"),
    "fp8_e4m3_block": TableFormat("e4m3", 128, group_rows=128, scale="float32"),
    "ternary": TableFormat("ternary"),
    **{f"trellis{bits}": TrellisFormat(bits) for bits in (2, 3, 4)},
    **{f"trellis{bits}_diagonal": TrellisFormat(bits, path="diagonal") for bits in (2, 3, 4)},
}
"""Formats by name; without a group size of its own a format has one scale a row."""

_FIXED = ("mxfp4", "nvfp4", "fp8_e4m3_tensor", "fp8_e5m2_tensor", "fp8_e4m3_block")  # the layout is the name


def number_format(
    name: str, *, group_size: int | None = None, symmetric: bool | None = None, scale: str | None = None,
    pad: bool | None = None,
) -> NumberFormat:  # fmt: skip
    """The format called ``name`` in `FORMATS`, with some of its fields changed.

    Args:
        name: for example ``"nf4"``; case and dashes do not matter.
        group_size: input columns that share a scale; ``None`` keeps the format's own.
        symmetric: for integers: zero points fixed at mid-range.
        scale: storage of the scales (`tnc.formats.SCALES`).
        pad: meet a group size that does not divide by padding.

    Raises:
        FormatError: for an unknown name (lists the valid ones) or a field that the format does not take.
    """
    key = name.strip().lower().replace("-", "_")
    if key not in FORMATS:
        raise FormatError(f"unknown number format {name!r}; expected one of {', '.join(FORMATS)}.")
    given = {"group_size": group_size, "symmetric": symmetric, "scale": scale, "pad": pad}
    changes = {k: v for k, v in given.items() if v is not None}
    own = FORMATS[key].__dataclass_fields__  # type: ignore[attr-defined]
    foreign = [k for k in changes if k not in own or (key in _FIXED and k in ("group_size", "scale"))]
    if foreign:
        raise FormatError(f"number format {key!r} does not take {', '.join(foreign)}; leave those out.")
    return replace(FORMATS[key], **changes)  # type: ignore[type-var]
