"""Tables of levels by code: normal floats, small floats, ternary."""

from __future__ import annotations

import math

import torch

from tnc.errors import FormatError


def _float_bits(dtype: torch.dtype) -> tuple[float, ...]:
    """Values of all 256 bytes of a float8 dtype; infinities are no levels."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float64)
    return tuple(v if math.isfinite(v) else math.nan for v in values.tolist())


_POSITIVE_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

TABLES: dict[str, tuple[float, ...]] = {
    # QLoRA (arXiv:2305.14314), appendix E
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # the same quantiles of the normal distribution for 8 levels
    "nf3": (
        -1.0, -0.5350227355957031, -0.24693143367767334, 0.0, 0.1833374798297882, 0.38199394941329956,
        0.6229857206344604, 1.0,
    ),
    # OCP MX specification 1.0, section 5.3.3: sign, two bits of exponent, one of mantissa
    "e2m1": (*_POSITIVE_E2M1, *(-v for v in _POSITIVE_E2M1)),
    "e4m3": _float_bits(torch.float8_e4m3fn),
    "e5m2": _float_bits(torch.float8_e5m2),
    "ternary": (-1.0, 0.0, 1.0),
}  # fmt: skip
"""Levels by name, in the order of the codes; NaN where a code stands for no number."""


def table_values(table: str | tuple[float, ...]) -> tuple[float, ...]:
    """Levels of a named table, or the given ones.

    Raises:
        FormatError: for an unknown name (lists them), or unless there are 2 to 256 finite levels, not all equal.
    """
    if isinstance(table, str):
        if table not in TABLES:
            raise FormatError(
                f"unknown table {table!r}; expected one of {', '.join(TABLES)}, or the levels as numbers."
            )
        return TABLES[table]
    if not 2 <= len(table) <= 256 or len(set(table)) < 2 or not all(map(math.isfinite, table)):
        raise FormatError(
            f"a table of {len(table)} levels {table[:4]} ...; expected 2 to 256 finite numbers, not all one."
        )
    return table
