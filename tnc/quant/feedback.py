"""The triangular factor behind rounding with feedback, and the damping that makes it exist."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import StatsError, check_finite

_FIRST_DAMPING = 1e-6  # tried after an undamped factorization failed
_LAST_DAMPING = 1e3  # a second moment factors long before; what fails here is far from semidefinite

# Relative to the diagonal entry. A pivot this small is rounding: up to 2e-11 was seen where the exact one is 0
# (n = 16), and H itself comes from float32 products. The default damping leaves pivots above 0.01 / n.
_LEAST_PIVOT = 1e-8


@dataclass(frozen=True, eq=False)
class Feedback:
    """``M + damping mean(diag M) I = V D Vᵀ`` in the order in which entries are rounded.

    Attributes:
        order: (n,) entry numbers in rounding order.
        factor: V (n, n), unit upper triangular, float64, rows and columns in ``order``.
        pivots: D (n,) relative to ``mean(diag M)``, in ``order``: what a unit error costs once the later entries
            have made up for it.
        damping: the damping used.
        notes: a sentence for everything that differs from what was asked.
    """

    order: Tensor
    factor: Tensor
    pivots: Tensor
    damping: float
    notes: tuple[str, ...]


def feedback(second: Tensor, damping: float, *, order: Tensor | None = None, side: str = "H") -> Feedback:
    """Factor a second moment for rounding with feedback.

    Entries go by falling diagonal unless ``order`` says otherwise. Dead ones (diagonal 0) are decoupled: they
    get and give no feedback. Where the factorization fails the damping grows tenfold, with a note.

    Args:
        second: (n, n) mean of ``x xᵀ`` (H) or ``g gᵀ`` (G).
        damping: at least 0, in units of ``mean(diag)``.
        order: (n,) entry numbers in rounding order.
        side: ``"H"`` or ``"G"``, for messages.

    Raises:
        StatsError: if the damping is negative, or the matrix is far from positive semidefinite.
        NonFiniteError: for NaN or Inf in the matrix.

    Cost: ``n³/3`` flops in float64.
    """
    if not (math.isfinite(damping) and damping >= 0):
        raise StatsError(f"damping={damping} must be a finite number of at least 0; the default is 0.01.")
    second = check_finite(second, f"the second moment {side}").double()
    if order is None:
        order = torch.argsort(second.diagonal(), descending=True, stable=True)
    normal, notes = _normalized(second[order][:, order], side)
    used = damping
    while (found := _unit_upper(normal, used)) is None:
        used = max(10 * used, _FIRST_DAMPING)
        if used > max(_LAST_DAMPING, 10 * damping):
            raise StatsError(
                f"{side} + {used / 10:g} mean(diag {side}) I is still not positive definite; expected a mean of "
                "x xᵀ, which is positive semidefinite. Calibrate again, or check the matrix given to from_hessian."
            )
    if used != damping:
        notes += (f"damping raised from {damping:g} to {used:g}: the damped {side} was not positive definite",)
    return Feedback(order, *found, used, notes)


def _normalized(second: Tensor, side: str) -> tuple[Tensor, tuple[str, ...]]:
    """The matrix over the mean of its diagonal with dead entries decoupled at 1, and a note on them."""
    dead = second.diagonal() <= 0
    mean = float(second.diagonal().mean())
    normal = second / mean if mean > 0 else second.clone()
    count = int(dead.sum())
    if count == 0:
        return normal, ()
    normal[dead, :] = 0
    normal[:, dead] = 0
    normal.diagonal()[dead] = 1
    what, index = ("columns", "jj") if side == "H" else ("rows", "ii")
    return normal, (f"{count} of {len(dead)} {what} are dead ({side}_{index} = 0): rounded to nearest",)


def _unit_upper(normal: Tensor, damping: float) -> tuple[Tensor, Tensor] | None:
    """V and D of ``normal + damping I = V D Vᵀ``, or ``None`` where a pivot is not positive beyond rounding."""
    damped = normal.clone()
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    upper: Tensor = lower.flip(0, 1)  # upper @ upper.T = damped
    pivots = upper.diagonal() ** 2
    if int(info) or not bool((pivots > _LEAST_PIVOT * damped.diagonal()).all()):
        return None
    return upper / upper.diagonal(), pivots
