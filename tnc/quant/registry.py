"""The registry of quantizers: a name, what it is, where it comes from, and the function that does it.

Every registered function has one form, ``run(weight, stats, format, **options) -> QuantizerResult``, so that
`QuantizeStage` and the recipes can use any of them by name. Statistics may be ``None``; a quantizer that needs
them says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tnc.errors import RecipeError, StatsError
from tnc.stats import LayerStats
from tnc.terms import Quantized


@dataclass(frozen=True, eq=False)
class QuantizerResult:
    """What a quantizer returns for reports.

    Attributes:
        term: the quantized weight.
        damping: largest multiple of ``mean(diag)`` that was added to a diagonal; ``None`` where none was factored.
        fallbacks: a sentence for everything that differs from what was asked.
    """

    term: Quantized
    damping: float | None = None
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizerEntry:
    """A row of `QUANTIZERS`.

    Attributes:
        summary: one line of what it does.
        source: paper, with its arXiv number.
        run: ``(weight, stats, format, *, options...) -> QuantizerResult``.
    """

    summary: str
    source: str
    run: Callable[..., QuantizerResult]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword-only options of ``run``."""
        parameters = inspect.signature(self.run).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


QUANTIZERS: dict[str, QuantizerEntry] = {}


def register_quantizer(name: str, entry: QuantizerEntry) -> None:
    """Add a quantizer under a lower-case name; a name can be taken once.

    Raises:
        RecipeError: if the name is taken.
    """
    key = _key(name)
    if key in QUANTIZERS:
        raise RecipeError(f"quantizer {key!r} is already registered ({QUANTIZERS[key].source}); choose another name.")
    QUANTIZERS[key] = entry


def quantizer(name: str, options: Iterable[str] = ()) -> QuantizerEntry:
    """The entry of a name; case and dashes do not matter.

    Args:
        name: for example ``"gptq"``.
        options: names of options that it must take.

    Raises:
        RecipeError: for an unknown name (lists the valid ones), or an option the quantizer does not take.
    """
    entry = QUANTIZERS.get(_key(name))
    if entry is None:
        raise RecipeError(f"quantizer method={name!r} is unknown; expected one of {', '.join(QUANTIZERS)}.")
    foreign = [option for option in options if option not in entry.options]
    if foreign:
        raise RecipeError(
            f"quantizer {_key(name)!r} does not take {', '.join(foreign)}; it takes {', '.join(entry.options)}."
        )
    return entry


def needed(stats: LayerStats | None, name: str) -> LayerStats:
    """The statistics, or `StatsError` where there are none."""
    if stats is None:
        raise StatsError(f"{name} needs calibration statistics; pass stats=..., or use method='rtn'.")
    return stats


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "_")
