"""Budgets of a whole model as value types, and the words for them on the command line.

``bpw=3.5``, ``bytes=1.2GB``, ``nats=0.02``, ``ppl=+2%``, ``error=0.02`` (of every layer), ``latency=12ms``,
``speedup=2x``. `BitsPerWeight`, `Bytes`, `Latency` and `Speedup` bound what is stored or spent, and the error is
minimised; `Nats`, `PerplexityIncrease` and `RelativeError` bound the error, and the bits are minimised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from tnc.decompose import BitsPerWeight, RelativeError
from tnc.errors import BudgetError

_DECIMAL, _BINARY = 1000, 1024
_BYTES = {
    "": 1, "B": 1, **{f"{p}B": _DECIMAL ** (i + 1) for i, p in enumerate("KMGT")},
    **{f"{p}IB": _BINARY ** (i + 1) for i, p in enumerate("KMGT")},
}  # fmt: skip
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True)
class Bytes:
    """At most ``value`` bytes of tensors in the checkpoint: compressed layers and everything else in it.

    Headers of the files and ``tnc.json`` are not counted: a few hundred bytes a layer.

    Args:
        value: an integer, or text with a decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB) unit.

    Raises:
        BudgetError: for text that is no size, or a size below 1.
    """

    value: int | str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _parse_bytes(self.value))

    @property
    def bits(self) -> int:
        """The same in bits."""
        return 8 * int(self.value)


@dataclass(frozen=True)
class Nats:
    """At most ``value`` nats per token of KL divergence to the dense model, the whole model together.

    Raises:
        BudgetError: if ``value`` is not positive and finite.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise BudgetError(f"Nats({self.value}) must be positive and finite, for example Nats(0.02).")


@dataclass(frozen=True)
class PerplexityIncrease:
    """Perplexity on held-out text at most ``value`` above that of the dense model; 0.02 and ``"2%"`` are the same.

    Raises:
        BudgetError: for text that is no percentage, or a value that is not positive and finite.
    """

    value: float | str

    def __post_init__(self) -> None:
        value = _parse_share(self.value)
        if not 0 < value < math.inf:
            raise BudgetError(f'PerplexityIncrease({self.value!r}) must be positive, for example "2%" or 0.02.')
        object.__setattr__(self, "value", value)

    @property
    def nats(self) -> float:
        """The same as an increase of the mean loss, ``ln(1 + value)`` nats per token."""
        return math.log1p(float(self.value))


@dataclass(frozen=True)
class Latency:
    """At most ``value`` seconds for one call of every compressed layer, by a measured table (`LatencyTable`).

    Args:
        value: seconds, or text such as ``"12ms"``.

    Raises:
        BudgetError: for text that is no time, or a time that is not positive and finite.
    """

    value: float | str

    def __post_init__(self) -> None:
        value = _parse_seconds(self.value)
        if not 0 < value < math.inf:
            raise BudgetError(f'Latency({self.value!r}) must be positive, for example "12ms" or 0.012 seconds.')
        object.__setattr__(self, "value", value)


@dataclass(frozen=True)
class Speedup:
    """The compressed layers take at most ``1 / value`` of the time of the dense ones, by a measured table.

    Raises:
        BudgetError: if ``value`` is not positive and finite.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise BudgetError(f"Speedup({self.value}) must be positive, for example Speedup(2).")


Budget = BitsPerWeight | Bytes | Nats | PerplexityIncrease | RelativeError | Latency | Speedup


def parse_budget(text: str) -> Budget:
    """The budget that ``kind=value`` names on the command line.

    Raises:
        BudgetError: for an unknown kind (lists the known ones) or a value that it cannot read.
    """
    kind, equals, value = text.strip().partition("=")
    reader = _READERS.get(kind.strip().lower())
    if not equals or reader is None:
        raise BudgetError(f"budget {text!r} is unknown; expected one of {_EXAMPLES}.")
    try:
        return reader(value.strip())
    except ValueError as error:
        reason = f": {error}" if isinstance(error, BudgetError) else ""
        raise BudgetError(f"budget {text!r} cannot be read{reason}; expected one of {_EXAMPLES}.") from error


def describe_budget(budget: Budget) -> str:
    """The words of `parse_budget` for a budget."""
    words: dict[type, Callable[[float], str]] = {
        BitsPerWeight: lambda v: f"bpw={v:g}", Bytes: lambda v: f"bytes={int(v)}", Nats: lambda v: f"nats={v:g}",
        PerplexityIncrease: lambda v: f"ppl=+{100 * v:g}%", RelativeError: lambda v: f"error={v:g}",
        Latency: lambda v: f"latency={1000 * v:g}ms", Speedup: lambda v: f"speedup={v:g}x",
    }  # fmt: skip
    return words[type(budget)](budget.value)  # type: ignore[arg-type]


def bits_within(bits_per_weight: float, elements: int) -> int:
    """The most whole bits whose quotient by ``elements``, as reports divide, is at most ``bits_per_weight``."""
    bits = math.floor(bits_per_weight * elements) + 1 if math.isfinite(bits_per_weight) else 2**62
    while bits / elements > bits_per_weight:  # products round
        bits -= 1
    return bits


def _parse_bytes(value: int | str) -> int:
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
        unit = None if found is None else _BYTES.get(found[2].upper())
        if found is None or unit is None or not _is_number(found[1]):
            raise BudgetError(f'Bytes({value!r}) is no size; expected for example "2.1GB", "800 MiB" or 2100000000.')
        value = math.floor(float(found[1]) * unit)
    if isinstance(value, bool) or value != int(value) or value < 1:
        raise BudgetError(f"Bytes({value!r}) must be a whole number of at least 1.")
    return int(value)


def _parse_share(value: float | str) -> float:
    if not isinstance(value, str):
        return float(value)
    text = value.strip().removeprefix("+")
    number, percent = text.removesuffix("%").strip(), text.endswith("%")
    if not _is_number(number):
        raise BudgetError(f'PerplexityIncrease({value!r}) is no share; expected for example "2%", "+2%" or 0.02.')
    return float(number) / 100 if percent else float(number)


def _parse_seconds(value: float | str) -> float:
    if not isinstance(value, str):
        return float(value)
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([a-zµ]*)\s*", value)
    if found is None or found[2] not in _SECONDS or not _is_number(found[1]):
        raise BudgetError(f'Latency({value!r}) is no time; expected for example "12ms", "850us" or 0.012.')
    return float(found[1]) * _SECONDS[found[2]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[str], Budget]] = {
    "bpw": lambda v: BitsPerWeight(float(v)),
    "bytes": Bytes,
    "nats": lambda v: Nats(float(v)),
    "ppl": PerplexityIncrease,
    "error": lambda v: RelativeError(float(v.removesuffix("%")) / (100 if v.endswith("%") else 1)),
    "latency": Latency,
    "speedup": lambda v: Speedup(float(v.lower().removesuffix("x"))),
}
_EXAMPLES = "bpw=3.5, bytes=1.2GB, nats=0.02, ppl=+2%, error=0.02, latency=12ms, speedup=2x"
