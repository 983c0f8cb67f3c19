"""`Gate`: how much of H to trust, decided by held-out tokens.

A full H of few tokens can overfit (QERA, arXiv:2410.06040, table 3: exact loses to diagonal on two models). So the
term is fitted in each of a few shrunk metrics, and the tokens that were kept out of H choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tnc.errors import RecipeError
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Expression, dense64


@dataclass(frozen=True)
class Gate:
    """Candidates ``(1 - rho) H + rho diag(H)``, with G where there is one (`Metric.shrunk`).

    Attributes:
        rhos: distinct, each in [0, 1]: 0 is the full H, 1 its diagonal. On ties the earlier one is kept.

    Raises:
        RecipeError: without candidates, or for one outside [0, 1].
    """

    rhos: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        if not self.rhos or not all(0 <= rho <= 1 for rho in self.rhos):
            raise RecipeError(
                f"Gate(rhos={self.rhos}) needs one or more shrinkages in [0, 1], such as (0.0, 0.1, 1.0)."
            )

    def candidates(self) -> dict[str, Callable[[LayerStats], Metric]]:
        """Name to the metric made of the statistics."""
        return {_name(rho): partial(Metric.shrunk, rho=rho) for rho in self.rhos}


def heldout_error(residual: Tensor, weight: Tensor, term: Expression, stats: LayerStats) -> float:
    """Error that ``term`` leaves of ``residual``, relative to ``weight``, in ``G ⊗ H`` of the held-out tokens.

    The statistics hold such tokens.
    """
    assert stats.heldout is not None, "asked only where there are held-out tokens"
    gradient = None if stats.gradient is None else stats.gradient.second.double()
    judge = Metric(stats.heldout.second.double(), gradient)
    return judge.relative(residual.double() - dense64(term), weight.double())


def describe(errors: dict[str, float]) -> str:
    """The choice and the held-out errors of all candidates, for the report."""
    best = min(errors, key=lambda name: errors[name])
    return f"metric = {best} by held-out error of " + ", ".join(f"{n} {e:.6f}" for n, e in errors.items())


def _name(rho: float) -> str:
    return {0.0: "full", 1.0: "diagonal"}.get(rho, f"shrunk({rho:g})")
