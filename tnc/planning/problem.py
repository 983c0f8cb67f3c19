"""A planning problem as arrays over options: which are allowed, what is minimised, what is bounded, what must agree."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tnc.decompose import BitsPerWeight, RelativeError
from tnc.errors import BudgetError
from tnc.planning.allocate import Floats, Front, Integers, Menu, front
from tnc.planning.budget import Budget, Bytes, Latency, Nats, PerplexityIncrease, Speedup, bits_within, describe_budget
from tnc.planning.constraints import LargestError, allowed_options
from tnc.planning.curve_table import CurveTable
from tnc.planning.curves import Option
from tnc.planning.exact import Limit
from tnc.planning.fuse import fuse
from tnc.planning.rules import Clock, Rules


@dataclass(frozen=True, eq=False)
class Problem:
    """One planning problem as arrays over options."""

    table: CurveTable
    budgets: tuple[Budget, ...]
    rules: Rules
    scale: float
    options: list[Option]
    first: Integers
    objective: str
    error: Floats
    bits: Floats
    seconds: Floats | None

    @classmethod
    def of(cls, table: CurveTable, budgets: tuple[Budget, ...], rules: Rules, scale: float) -> Problem:
        """Filter the options and lay them out."""
        bounds = tuple(LargestError(b.value) for b in budgets if isinstance(b, RelativeError))
        allowed = allowed_options(table.layers, (*rules.constraints, *bounds))
        options = [option for each in allowed.values() for option in each]
        first = np.concatenate([[0], np.cumsum([len(each) for each in allowed.values()])])
        weight = np.repeat([rules.weights.get(name, 1.0) for name in allowed], np.diff(first))
        nats = np.array([o.heldout_nats for o in options])
        objective = "relative" if np.isnan(nats).any() else "nats"
        error = weight * (nats if objective == "nats" else np.array([o.heldout_error for o in options]) ** 2)
        bits = np.array([o.bits for o in options], dtype=np.float64)
        seconds = None if rules.clock is None else _seconds(rules.clock, table, allowed)
        return cls(table, budgets, rules, scale, options, first, objective, error, bits, seconds)

    def front(self) -> Front:
        """The whole trade-off of error against bits, with the fused groups as units."""
        menu = Menu(self.first, self.error, self.bits)
        return front(menu if self.agreement is None else fuse(menu, *self.agreement).menu)

    def limits(self) -> list[Limit]:
        """What the budgets bound."""
        return [limit for budget in self.budgets for limit in self._limits(budget)]

    @cached_property
    def agreement(self) -> tuple[Integers, Integers] | None:
        """(group of each layer, scheme of each option) that agree: one base of fused layers, one shared factor.

        A shared right factor is a scheme of its own, which all layers of a group take or none; of the other options
        all are one scheme, unless fused kernels ask for one base, which is then that of all experts, too.
        ``None`` where nothing has to agree.
        """
        names, fused = list(self.table.layers), self.rules.fused
        sharing = {names[at] for at, option in zip(self._layer_of, self.options, strict=True) if option.choice.shared}
        groups = [group for group in self.table.groups if fused or sharing.intersection(group)]
        groups += expert_groups(names) if fused else []
        if not groups:
            return None
        leader = leaders(groups)
        numbers = {name: at for at, name in enumerate(dict.fromkeys(leader.get(n, n) for n in names))}
        schemes = {base: at if fused else 0 for at, base in enumerate(self.table.portfolio.bases)}
        sharers = dict.fromkeys(o.choice for o in self.options if o.choice.shared)
        shared = {choice: len(schemes) + at for at, choice in enumerate(sharers)}
        scheme = [shared[o.choice] if o.choice.shared else schemes[o.choice.base] for o in self.options]
        return np.array([numbers[leader.get(n, n)] for n in names]), np.array(scheme)

    @property
    def _layer_of(self) -> Integers:
        """(options,) the layer of each option."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    def _limits(self, budget: Budget) -> list[Limit]:
        """What a budget bounds; nothing for `RelativeError`, which filters options."""
        elements = self.table.elements
        if isinstance(budget, RelativeError):
            return []
        if isinstance(budget, BitsPerWeight):
            limit = Limit(self.bits, float(bits_within(budget.value, elements)), "bits")
            return [self._checked(budget, limit, lambda bits: f"{bits / elements:.4f} bits per weight")]
        if isinstance(budget, Bytes):
            other = self.table.other_bytes
            limit = Limit(self.bits, float(budget.bits - 8 * other), "bits")
            return [self._checked(budget, limit, lambda bits: f"{int(bits) // 8 + other:,} bytes")]
        if isinstance(budget, Nats | PerplexityIncrease):
            return [self._error_limit(budget)]
        return [self._time_limit(budget)]

    def _error_limit(self, budget: Nats | PerplexityIncrease) -> Limit:
        if self.objective != "nats":
            raise BudgetError(
                f"{describe_budget(budget)} is in nats, and these curves were measured without gradients; calibrate "
                "with fisher=True, or use bpw=, bytes= or error=."
            )
        nats = budget.value if isinstance(budget, Nats) else budget.nats
        limit = Limit(self.error, nats / self.scale, "error")
        return self._checked(budget, limit, lambda value: f"{value * self.scale:.4g} nats")

    def _time_limit(self, budget: Latency | Speedup) -> Limit:
        if self.seconds is None or self.rules.clock is None:
            raise BudgetError(
                f"{describe_budget(budget)} needs measured times; make a table with tnc bench --table and pass it as "
                "Rules(clock=Clock(LatencyTable.load(...)))."
            )
        clock = self.rules.clock
        dense = sum(clock.table.dense_seconds(layer.shape, clock.tokens) for layer in self.table.layers.values())
        value = float(budget.value) if isinstance(budget, Latency) else dense / budget.value
        return self._checked(budget, Limit(self.seconds, value, "time"), lambda s: f"{1000 * s:.4g} ms")

    def _checked(self, budget: Budget, limit: Limit, words: Callable[[float], str]) -> Limit:
        """The limit, if the options reach it."""
        least = float(np.minimum.reduceat(limit.usage, self.first[:-1]).sum())
        most = float(np.maximum.reduceat(limit.usage, self.first[:-1]).sum())
        if limit.value < least:
            raise BudgetError(
                f"the budget {describe_budget(budget)} is below the smallest reachable: this portfolio reaches from "
                f"{words(least)} to {words(most)}. Ask for more, or widen the portfolio."
            )
        if isinstance(budget, BitsPerWeight | Bytes) and limit.value > most:
            raise BudgetError(
                f"the budget {describe_budget(budget)} is above the largest option everywhere: this portfolio reaches "
                f"from {words(least)} to {words(most)}. There is nothing to choose; leave the model dense."
            )
        return limit


def expert_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers whose names differ in the number of the expert alone: one projection of all experts of a block."""
    found: dict[str, list[str]] = {}
    for name in names:
        without = re.sub(r"(\bexperts(?:\.[A-Za-z_]\w*)?)\.\d+", r"\1.*", name)
        if without != name:
            found.setdefault(without, []).append(name)
    return [tuple(group) for group in found.values() if len(group) > 1]


def leaders(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Of each layer the one that stands for its group, groups with a layer in common put together."""
    found: dict[str, str] = {}
    for group in groups:
        met = [found[name] for name in group if name in found]
        leader = met[0] if met else group[0]
        found |= {name: leader for name, now in found.items() if now in met} | dict.fromkeys(group, leader)
    return found


def _seconds(clock: Clock, table: CurveTable, allowed: Mapping[str, tuple[Option, ...]]) -> Floats:
    known: dict[tuple[tuple[int, int], object], float] = {}
    found = []
    for name, options in allowed.items():
        shape = table.layers[name].shape
        for option in options:
            key = (shape, option.choice)
            if key not in known:
                known[key] = clock.table.seconds(shape, option.choice, clock.tokens)
            found.append(known[key])
    return np.array(found)
