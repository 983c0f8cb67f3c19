"""What a plan may not choose: filters on the options of a layer, composable in any number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from tnc.errors import BudgetError
from tnc.planning.curves import LayerCurves, Option
from tnc.planning.portfolio import DENSE

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that common serving stacks have kernels for."""


class Constraint(Protocol):
    """Anything that rules out options."""

    def allows(self, name: str, option: Option) -> bool:
        """Whether layer ``name`` may take the option."""

    def describe(self) -> str:
        """A few words, for messages."""


@dataclass(frozen=True)
class KeepDense:
    """Layers whose name matches a glob pattern stay dense: the first and last block, for example.

    Attributes:
        patterns: such as ``"model.layers.0.*"``.
    """

    patterns: tuple[str, ...]

    def allows(self, name: str, option: Option) -> bool:
        """Only the dense option for layers that match."""
        return option.choice.base == DENSE or not any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def describe(self) -> str:
        """The patterns."""
        return f"dense {', '.join(self.patterns)}"


@dataclass(frozen=True)
class LargestError:
    """No layer above a relative error on held-out tokens.

    Attributes:
        value: ``‖E‖_H / ‖W‖_H``.
        patterns: layers it holds for.
    """

    value: float
    patterns: tuple[str, ...] = ("*",)

    def allows(self, name: str, option: Option) -> bool:
        """Only options within the error."""
        return option.heldout_error <= self.value or not any(fnmatchcase(name, each) for each in self.patterns)

    def describe(self) -> str:
        """The bound."""
        return f"relative error <= {self.value:g}"


@dataclass(frozen=True)
class AllowedRanks:
    """Ranks that the serving stack has kernels for, and 0.

    Attributes:
        ranks: such as `SERVED_RANKS`.
    """

    ranks: tuple[int, ...] = SERVED_RANKS

    def allows(self, name: str, option: Option) -> bool:
        """Rank 0 or one of the list."""
        return option.choice.rank == 0 or option.choice.rank in self.ranks

    def describe(self) -> str:
        """The ranks."""
        return f"ranks {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class AllowedBases:
    """Bases by name, for all layers or some.

    Attributes:
        bases: names of the portfolio.
        patterns: layers it holds for.
    """

    bases: tuple[str, ...]
    patterns: tuple[str, ...] = ("*",)

    def allows(self, name: str, option: Option) -> bool:
        """Only the named bases."""
        return option.choice.base in self.bases or not any(fnmatchcase(name, each) for each in self.patterns)

    def describe(self) -> str:
        """The bases."""
        return f"bases {', '.join(self.bases)}"


def allowed_options(
    layers: Mapping[str, LayerCurves], constraints: Sequence[Constraint]
) -> dict[str, tuple[Option, ...]]:
    """The options of every layer that all constraints allow.

    Raises:
        BudgetError: if they leave a layer nothing; names the layer and the fewest constraints that contradict.
    """
    found = {}
    for name, layer in layers.items():
        options = layer.options
        found[name] = tuple(o for o in options if all(c.allows(name, o) for c in constraints))
        if not found[name]:
            raise BudgetError(_contradiction(name, options, constraints))
    return found


def _contradiction(name: str, options: Sequence[Option], constraints: Sequence[Constraint]) -> str:
    for first in constraints:
        if not any(first.allows(name, o) for o in options):
            least = min((o.heldout_error for o in options), default=float("nan"))
            return (
                f"no option of layer {name!r} has {first.describe()}; the smallest reachable relative error of this "
                f"portfolio is {least:.3g}. Widen the portfolio or the constraint."
            )
    for at, first in enumerate(constraints):
        for second in constraints[:at]:
            if not any(first.allows(name, o) and second.allows(name, o) for o in options):
                return (
                    f"constraints contradict on layer {name!r}: {second.describe()} and {first.describe()} leave no "
                    "option. Drop or widen one of the two."
                )
    every = "; ".join(each.describe() for each in constraints)
    return f"constraints contradict on layer {name!r}: together they leave no option: {every}. Drop or widen one."
