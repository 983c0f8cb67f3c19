"""The knapsack at the size of large models: certified gap and time, and HiGHS beside it where that is feasible."""

from __future__ import annotations

import numpy as np

from benchmarks.registry import Problem, case
from tnc.planning.allocate import Allocation, Menu, allocate, front
from tnc.planning.close_gap import close_gap
from tnc.planning.exact import Limit, allocate_exactly


def curves(units: int, options: int, seed: int = 0) -> Menu:
    """Error curves of 2 to 8 bits with noise: cost falls fourfold a bit, layers differ by three decades."""
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.uniform(2, 8, (units, options)), axis=1)
    weights = 10.0 ** rng.uniform(4, 7, (units, 1))
    nats = 10.0 ** rng.uniform(-6, -3, (units, 1)) * 4.0 ** -(bits - 2) * rng.lognormal(sigma=0.1, size=bits.shape)
    return Menu(np.arange(units + 1) * options, nats.ravel(), np.round(bits * weights).ravel())


def _gap(found: Allocation) -> dict[str, float]:
    return {"relative gap": found.gap / found.cost}


def _limit(menu: Menu) -> float:
    """Two fifths of the way from the smallest to the largest plan."""
    least = np.minimum.reduceat(menu.usage, menu.first[:-1]).sum()
    most = np.maximum.reduceat(menu.usage, menu.first[:-1]).sum()
    return float(0.6 * least + 0.4 * most)


@case("plan-10000x200", "choose among 10,000 layers x 200 options under one budget; gap certified")
def large() -> Problem:
    """The curves of a very large model: from options to a plan, and a further budget from the same front."""
    menu = curves(10_000, 200)
    limit, made = _limit(menu), front(menu)
    return Problem(
        ways={"front and plan": lambda: allocate(menu, limit), "a further budget": lambda: made.allocate(0.9 * limit)},
        errors=_gap, limit={"relative gap": 1e-4}, repeats=3,
    )  # fmt: skip


@case("plan-224x100", "the same for a 7B Llama's 224 layers x 100 options, with HiGHS beside it")
def usual() -> Problem:
    """The curves of a usual model."""
    menu = curves(224, 100)
    limit = _limit(menu)
    return Problem(
        ways={"HiGHS": lambda: allocate_exactly(menu, [Limit(menu.usage, limit)]),
              "front and plan": lambda: allocate(menu, limit),
              "with the gap closed": lambda: close_gap(menu, limit, allocate(menu, limit))},
        errors=_gap, limit={"relative gap": 1e-3}, once=frozenset({"HiGHS"}),
    )  # fmt: skip
