"""How a plan may be made: constraints, weights, what is fused, the clock of latency budgets, and how long to search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tnc.planning.constraints import Constraint
from tnc.planning.latency import LatencyTable


@dataclass(frozen=True, eq=False)
class Clock:
    """What latency budgets are counted by.

    Attributes:
        table: measured on the device that will serve.
        tokens: in one call: 1 is decoding.
    """

    table: LatencyTable
    tokens: int = 1


@dataclass(frozen=True)
class Rules:
    """How a plan may be made.

    Attributes:
        constraints: filters on options, all of which hold.
        fused: layers that see one input take one base, and so do the experts of a block, as fused kernels need.
        weights: multiples of the predicted nats by layer name: 1 where absent. What measuring layers alone says of
            them is one (`tnc.models.probes`). Routed experts need none, their G counts how often the router chooses
            them.
        clock: for latency and speedup budgets.
        exact: close the gap however many layers there are; for few it is closed anyway (`tnc.planning.solve`).
        seconds: that HiGHS may take where ``exact``, or several limits, ask for it.
    """

    constraints: tuple[Constraint, ...] = ()
    fused: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    clock: Clock | None = None
    exact: bool = False
    seconds: float = 60.0
