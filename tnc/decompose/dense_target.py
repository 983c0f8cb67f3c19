"""`DenseTarget`: a layer behind compressed ones aims at the outputs of the uncompressed model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.decompose.transforms import Transformed, unwrapped
from tnc.errors import StatsError
from tnc.stats import LayerStats


@dataclass(frozen=True)
class DenseTarget:
    """Decompose ``W C H⁻¹``, the least-squares map from compressed inputs to dense outputs, in the place of W.

    With x the layer's input in the uncompressed model and x̃ the one behind compressed layers, ``C = E[x x̃ᵀ]`` and
    ``H = E[x̃ x̃ᵀ]``, ``E‖W x − Ŵ x̃‖² = ‖Ŵ − W C H⁻¹‖²_H + const``. So any stages that fit in H fit this loss,
    exactly, when they are given ``W* = W + strength · W (C − H)(H + damping mean(diag H) I)⁻¹``. Without a cross
    moment, or with ``C = H``, the weight stays as it is. Reports are measured against W and the inputs x̃: the error
    then includes the correction, and H-error and predicted nats rise while the model gets better.

    Attributes:
        strength: share of the correction, in [0, 1].
        damping: at least 0, in units of ``mean(diag H)``.

    Raises:
        StatsError: for values out of range, or if the damped H is not positive definite.

    Source: GPTAQ (arXiv:2504.02692), which folds the same asymmetric loss into GPTQ's column updates; here its
    closed-form minimiser is the target.
    """

    strength: float = 1.0
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not (0 <= self.strength <= 1 and math.isfinite(self.damping) and self.damping >= 0):
            raise StatsError(
                f"DenseTarget(strength={self.strength}, damping={self.damping}) needs 0 <= strength <= 1, damping >= 0."
            )

    def apply(self, weight: Tensor, stats: LayerStats | None) -> Transformed:
        """The corrected weight with the same statistics."""
        dense = weight.double()
        if stats is None or stats.inputs.cross is None:
            note = "no cross moment of dense and compressed inputs: the target is the weight itself"
            return Transformed(dense, stats, unwrapped, (note,))
        hessian = stats.hessian.to(dense)
        mean = float(hessian.diagonal().mean())
        if mean <= 0:
            return Transformed(dense, stats, unwrapped)
        damped = hessian + self.damping * mean * torch.eye(len(hessian)).to(dense)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            raise StatsError(
                f"H + {self.damping:g} mean(diag H) I is not positive definite; raise DenseTarget(damping=...)."
            )
        shift = dense @ (stats.inputs.cross.to(dense) - hessian)
        return Transformed(dense + self.strength * torch.cholesky_solve(shift.T, factor).T, stats, unwrapped)
