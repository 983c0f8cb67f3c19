"""What a recipe is, and the registry that builds one by name.

`recipe("eora", bits=3, group_size=64, rank=16)` builds one; `RECIPES` lists them. The published methods
themselves are rows in `tnc.decompose.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tnc.decompose.sizes import BitsPerWeight, Size
from tnc.decompose.stages import Stage
from tnc.decompose.transforms import Transform
from tnc.errors import RecipeError
from tnc.formats import IntFormat, NumberFormat, number_format


@dataclass(frozen=True)
class Recipe:
    """Stages for every layer of a model.

    Attributes:
        name: as in `RECIPES`, or your own.
        stages: fitted in this order.
        sweeps: rounds over the stages.
        options: the arguments it was built from, for reports.
        pooled: budget in bits per weight over the whole model, spent by `tnc.planning.pooled_ranks`; the last
            stage's rank is then replaced for each layer. ``None`` uses the stages as they are everywhere.
        transforms: changes of basis around the stages, the first outermost.
        shared_inputs: layers that see the same inputs (q/k/v, gate/up) get one right factor in their low-rank terms
            (`tnc.decompose.shared`); ``rank`` is then that of the group.
        candidates: recipes that each layer tries in the place of stages of its own (`tnc.decompose.best`).
        limit: stored bits that a candidate may take.
        block_steps: steps of learning codes against the outputs of blocks (`tnc.models.round_blocks`) at the end.
        margin: share by which a candidate must undercut those before it to take their place.
    """

    name: str
    stages: tuple[Stage, ...]
    sweeps: int = 1
    options: Mapping[str, Any] | None = None
    pooled: BitsPerWeight | None = None
    transforms: tuple[Transform, ...] = ()
    shared_inputs: bool = False
    candidates: tuple[Recipe, ...] = ()
    limit: BitsPerWeight | None = None
    margin: float = 0.0
    block_steps: int = 0

    def describe(self) -> str:
        """Name and arguments on one line."""
        given = ", ".join(f"{k}={v}" for k, v in (self.options or {}).items() if v is not None)
        return f"{self.name}({given})"


@dataclass(frozen=True)
class RecipeEntry:
    """A row of `RECIPES`: what it is, where it comes from, which options it needs, how it is built."""

    summary: str
    source: str
    options: tuple[str, ...]
    build: Callable[..., Recipe]


RECIPES: dict[str, RecipeEntry] = {}


def register_recipe(name: str, entry: RecipeEntry) -> None:
    """Add a recipe under a lower-case name; a name can be taken once."""
    key = _key(name)
    if key in RECIPES:
        raise RecipeError(f"recipe {key!r} is already registered ({RECIPES[key].source}); choose another name.")
    RECIPES[key] = entry


def recipe(
    name: str, *, bits: int | None = None, group_size: int | None = None, symmetric: bool | None = None,
    format: NumberFormat | str | None = None, rank: Size | None = None, blocks: int | None = None,
    cores: int | None = None, factor_bits: int | None = None, factor_format: NumberFormat | str | None = None,
    sweeps: int | None = None,
    state_bits: int | None = None,
) -> Recipe:  # fmt: skip
    """Build a recipe of `RECIPES`.

    Args:
        name: for example ``"eora"``; case and dashes do not matter.
        bits: width of the quantized base.
        group_size: input columns that share a scale; ``None`` is one group a row.
        symmetric: zero points fixed at mid-range; default asymmetric.
        format: number format of the base instead of ``bits``: a name of `tnc.formats.FORMATS`, which
            ``group_size`` and ``symmetric`` then refine, or a `tnc.formats.NumberFormat` by itself.
        rank: of the low-rank or structured term, or largest bond dimension of a matrix product operator: an int,
            `Rank`, `RelativeError` or `BitsPerWeight`.
        blocks: of a structured term, on each side of the weight.
        cores: of a matrix product operator; default 2.
        factor_bits: width of the low-rank factors, or of the cores of a matrix product operator, with
            ``group_size``; by default they are stored in the weight's dtype.
        factor_format: number format of the factors instead of ``factor_bits``, named or given as ``format`` is.
        sweeps: rounds of alternation, at most.
        state_bits: of a trellis, 12 by default; 14 to 16 lower the error, cost no bits and take longer to encode.

    Raises:
        RecipeError: for an unknown name (lists the valid ones), an option the recipe does not take, or a missing one.
    """
    entry = RECIPES.get(_key(name))
    if entry is None:
        raise RecipeError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}.")
    given = {
        "bits": bits, "group_size": group_size, "symmetric": symmetric, "format": format, "rank": rank,
        "blocks": blocks, "cores": cores, "factor_bits": factor_bits, "factor_format": factor_format, "sweeps": sweeps,
        "state_bits": state_bits,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    foreign = [k for k in given if k not in entry.options]
    missing = [k for k in ("bits", "rank") if k in entry.options and k not in given]
    if "format" in given and "format" in entry.options:
        _check_format_alone(given)
        missing = [k for k in missing if k != "bits"]
    if foreign or missing:
        raise RecipeError(
            f"recipe {_key(name)!r} takes {', '.join(entry.options)}; "
            + (f"it does not take {', '.join(foreign)}. " if foreign else "")
            + (f"Missing: {', '.join(missing)}." if missing else "Leave those out.")
        )
    return replace(entry.build(**given), name=_key(name), options=given)


def base_format(
    *, bits: int | None = None, group_size: int | None = None, symmetric: bool | None = None,
    format: NumberFormat | str | None = None,
) -> NumberFormat:  # fmt: skip
    """The number format that the options of `recipe` mean."""
    if isinstance(format, str):
        return number_format(format, group_size=group_size, symmetric=symmetric)
    if format is not None:
        return format
    assert bits is not None, "recipe() asks for bits or a format"
    return IntFormat(bits, group_size, bool(symmetric))


def factor_format_of(
    *, factor_bits: int | None = None, factor_format: NumberFormat | str | None = None, group_size: int | None = None,
) -> NumberFormat | None:  # fmt: skip
    """The number format of low-rank factors that the options of `recipe` mean; ``None`` for float factors.

    Raises:
        RecipeError: for both ``factor_bits`` and ``factor_format``.
    """
    if factor_format is None:
        return None if factor_bits is None else IntFormat(factor_bits, group_size)
    if factor_bits is not None:
        raise RecipeError(f"factor_format={factor_format!r} already says factor_bits; leave out one of them.")
    return number_format(factor_format) if isinstance(factor_format, str) else factor_format


def _check_format_alone(given: Mapping[str, Any]) -> None:
    """A format excludes the options it says by itself."""
    named = isinstance(given["format"], str)
    twice = [k for k in (("bits",) if named else ("bits", "group_size", "symmetric")) if k in given]
    if twice:
        raise RecipeError(f"format={given['format']!r} already says {', '.join(twice)}; leave out one of them.")


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "_")
