"""The planned contraction of matrix product operators: for each class of tokens the way of least predicted time.

FLOPs mislead here: a two-core operator of bond 64 over 64 x 64 modes takes twice the FLOPs of its dense matrix, and
most of the time of an einsum goes into permutations and into intermediates that leave the cache. Four ways are
priced with a few measured constants of the device (`tnc.kernels.costs`):

- *sweep*: core by core from the last one, in groups that are merged first where that is cheaper, a slice of tokens at
  a time so that intermediates stay in the cache. In this order the stored layout (r_prev, o, i, r_next) is the matrix
  that each step multiplies with, so no step permutes anything.
- *path*: the order of fewest FLOPs, as the ``einsum`` kernel runs it.
- *rebuild*: a block of rows of the dense weight at a time, rebuilt, used and dropped.
- *keep*, on CPU: the dense weight rebuilt once and kept. A process keeps one, or what the user gives room for.
"""

from __future__ import annotations

from typing import TypeGuard

import torch

from tnc.kernels.einsum import LIMITS, Added, Einsum, Plan, plan_for
from tnc.kernels.mpo_prices import candidates
from tnc.kernels.mpo_ways import Planned
from tnc.kernels.table import Kernel, register_kernel
from tnc.terms import Expression, Mpo, Sum


def plan_mpo(mpo: Mpo, prefix: str, tokens: int) -> Planned:
    """The way predicted to take the least time for ``tokens`` rows of ``x`` in the dtype of the cores."""
    return min(candidates(mpo, prefix, tokens), key=lambda plan: plan.seconds)


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    terms = operator.terms if isinstance(operator, Sum) else (operator,)
    if not any(_is_planned(term) for term in terms):
        return "plans matrix product operators of two cores or more, alone or as terms of a sum"
    return None


def _is_planned(term: Expression) -> TypeGuard[Mpo]:
    return isinstance(term, Mpo) and len(term.cores) > 1 and 0 not in term.ranks


def _plan(operator: Expression, tokens: int) -> Plan:
    if isinstance(operator, Mpo):
        return plan_mpo(operator, "", tokens)
    assert isinstance(operator, Sum)
    named = [(term, f"{i}.") for i, term in enumerate(operator.terms)]
    parts = tuple(plan_mpo(t, p, tokens) if _is_planned(t) else plan_for(t, p, tokens) for t, p in named)
    return Added(parts, (), sum(part.flops for part in parts))


def bind(operator: Expression) -> Einsum:
    """The ways of an operator that the row serves, one a class of tokens."""
    return Einsum.of([_plan(operator, limit) for limit in LIMITS])


register_kernel(Kernel("mpo", _serves, bind, priority=15))
