"""The same choice to proven optimality, and with several limits at once: HiGHS by `scipy.optimize.milp`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[attr-defined]
from scipy.sparse import csr_matrix, hstack, vstack

from tnc.errors import BudgetError
from tnc.planning.allocate import Allocation, Floats, Integers, Menu

_SLACK = 1e-6  # HiGHS meets a row to this; a limit that it overruns is tightened by twice that
_ATTEMPTS = 4
_LARGEST = 100.0  # coefficient of a limit's row: at 1 many solutions overrun it, far above HiGHS mends some of its own


@dataclass(frozen=True, eq=False)
class Limit:
    """``Σ usage[chosen] <= value``.

    Attributes:
        usage: (options,) what is bounded.
        value: the bound.
        name: of the limit, for messages.
    """

    usage: Floats
    value: float
    name: str = "usage"


def allocate_exactly(
    menu: Menu, limits: Sequence[Limit], *, group: Integers | None = None, scheme: Integers | None = None,
    seconds: float = 60.0,
) -> Allocation:  # fmt: skip
    """Least cost within every limit, by branch and cut; the lower bound is that of the search.

    Args:
        menu: the options; its own ``usage`` is reported and not limited.
        limits: all must hold.
        group: (layers,) layers of one group take options of one scheme; ``None`` leaves them free.
        scheme: (options,) the scheme of each option; needed with ``group``.
        seconds: after which the best choice so far is returned, with its bound.

    Returns:
        The allocation; its multiplier is not a number.

    Raises:
        BudgetError: if no choice meets all limits (names them), or none was found in time.

    Source: HiGHS (Huangfu and Hall 2018), with relative gap 0 asked.
    """
    structure = _one_each(menu) if group is None or scheme is None else _agreeing(menu, group, scheme)
    scale = max(float(np.abs(menu.cost).max()), float(np.finfo(np.float64).tiny))
    slack: Floats = np.zeros(len(limits))
    for _ in range(_ATTEMPTS):
        found = _solve(menu.cost / scale, limits, slack, structure, seconds)
        if found.x is None:
            break
        chosen = _chosen(menu, found.x)
        over = np.array([float(each.usage[chosen].sum()) > each.value for each in limits], dtype=bool)
        if not over.any():
            cost = float(menu.cost[chosen].sum())
            bound = float(found.mip_dual_bound) * scale
            return Allocation(chosen, cost, float(menu.usage[chosen].sum()), min(bound, cost), float("nan"))
        slack = slack + 2 * _SLACK * over
    names = " and ".join(f"{each.name} <= {each.value:g}" for each in limits)
    raise BudgetError(f"no choice of options was found within {names} ({found.message}); ask for less, or allow more.")


def _solve(cost: Floats, limits: Sequence[Limit], slack: Floats, structure: LinearConstraint, seconds: float) -> Any:  # noqa: ANN401
    columns = structure.A.shape[1]
    padded = np.concatenate([cost, np.zeros(columns - len(cost))])
    rows = [structure]
    for each, tightened in zip(limits, slack, strict=True):
        scale = float(np.abs(each.usage).max()) / _LARGEST or 1.0
        usage = np.concatenate([each.usage / scale, np.zeros(columns - len(cost))])
        rows.append(LinearConstraint(csr_matrix(usage[None]), -np.inf, each.value / scale - tightened))
    options = {"time_limit": seconds, "mip_rel_gap": 0.0}
    with _prints_on_stderr():
        return milp(padded, constraints=rows, integrality=np.ones(columns), bounds=Bounds(0, 1), options=options)


@contextmanager
def _prints_on_stderr() -> Iterator[None]:
    """HiGHS 1.12 prints a line wherever it mends a solution, whatever it was asked; stdout may be a file of JSON."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)  # what C has buffered
        os.dup2(stdout, 1)
        os.close(stdout)


def _chosen(menu: Menu, x: Floats) -> Integers:
    """The option of largest value of each unit: its rounding."""
    order = np.lexsort((-x[: len(menu.cost)], menu.unit))
    best: Integers = order[menu.first[:-1]]
    return best


def _one_each(menu: Menu) -> LinearConstraint:
    entries = (np.ones(len(menu.cost)), (menu.unit, np.arange(len(menu.cost))))
    return LinearConstraint(csr_matrix(entries, shape=(menu.units, len(menu.cost))), 1, 1)


def _agreeing(menu: Menu, group: Integers, scheme: Integers) -> LinearConstraint:
    """One option each, and in each group one switch a scheme that its layers follow."""
    shared = np.bincount(group)[group] > 1  # (layers,)
    options = np.flatnonzero(shared[menu.unit])
    follow, row = np.unique(np.stack([menu.unit[options], scheme[options]]), axis=1, return_inverse=True)
    switches, switch = np.unique(np.stack([group[follow[0]], follow[1]]), axis=1, return_inverse=True)
    missing = np.bincount(switch.ravel(), minlength=switches.shape[1]) < np.bincount(group)[switches[0]]
    x = csr_matrix((np.ones(len(options)), (row.ravel(), options)), shape=(follow.shape[1], len(menu.cost)))
    allowed = np.where(missing[switch.ravel()], 0.0, -1.0)  # a scheme that a layer of the group lacks is ruled out
    y = csr_matrix((allowed, (np.arange(follow.shape[1]), switch.ravel())), shape=(follow.shape[1], switches.shape[1]))
    one = _one_each(menu)
    top = hstack([one.A, csr_matrix((menu.units, switches.shape[1]))])
    bounds = np.concatenate([np.ones(menu.units), np.zeros(follow.shape[1])])
    return LinearConstraint(csr_matrix(vstack([top, hstack([x, y])])), bounds, bounds)
