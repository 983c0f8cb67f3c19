"""The metric ``G ⊗ H``: the one place that turns statistics into a norm and a price in nats.

``norm(E)² = tr(Eᵀ G E H)``; with Fisher factors ``½ norm(E)²`` predicts the KL divergence to the dense
model in nats per token (MATH.md section 0). A side is ``None`` (identity), a vector (diagonal) or a matrix.
No side is ever inverted or damped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import StatsError
from tnc.stats import LayerStats


@dataclass(frozen=True, eq=False)
class Metric:
    """A positive semidefinite form on weight errors.

    Attributes:
        hessian: input side H: ``None``, (n,) or (n, n), float64.
        gradient: output side G: ``None``, (m,) or (m, m), float64.
    """

    hessian: Tensor | None = None
    gradient: Tensor | None = None

    @classmethod
    def identity(cls, stats: LayerStats | None = None) -> Metric:
        """Plain Frobenius norm."""
        return cls()

    @classmethod
    def rms(cls, stats: LayerStats) -> Metric:
        """``H = diag(E x²)`` (QERA-approx, arXiv:2410.06040)."""
        return cls(stats.inputs.diagonal)

    @classmethod
    def mean_abs(cls, stats: LayerStats, *, alpha: float = 1.0) -> Metric:
        """``H = diag((E|x|)^{2 alpha})``: L²QER (arXiv:2402.02446) and ASVD (arXiv:2312.05821) at alpha = 1.

        Raises:
            StatsError: if the statistics came from a Hessian alone and hold no mean of ``|x|``.
        """
        if stats.inputs.mean_abs is None:
            raise StatsError(
                "these statistics hold no mean of |x| (they were made from a Hessian); calibrate with activations, "
                "or use Metric.rms, which needs only diag(H)."
            )
        return cls(stats.inputs.mean_abs.double() ** (2 * alpha))

    @classmethod
    def full(cls, stats: LayerStats) -> Metric:
        """Full ``H``, identity on the output side: the layer's squared output error."""
        return cls(stats.hessian.double())

    @classmethod
    def salient(cls, stats: LayerStats, *, channels: int) -> Metric:
        """``H`` of the ``channels`` inputs of largest ``H_jj`` alone, zero elsewhere; G where there is one.

        Source: the initialisation of ODLRI (arXiv:2506.02077): the low-rank term takes up what outliers multiply.

        Raises:
            StatsError: for fewer than one channel.
        """
        if channels < 1:
            raise StatsError(f"Metric.salient(channels={channels}) sees no input; expected at least 1 channel.")
        hessian = stats.hessian.double()
        mask = torch.zeros(len(hessian), dtype=torch.float64, device=hessian.device)
        mask[torch.argsort(hessian.diagonal(), descending=True, stable=True)[:channels]] = 1
        gradient = None if stats.gradient is None else stats.gradient.second.double()
        return cls(hessian * mask * mask.unsqueeze(1), gradient)

    @classmethod
    def shrunk(cls, stats: LayerStats, rho: float) -> Metric:
        """``(1 - rho) H + rho diag(H)``, with G where there is one: less trust in correlations of few tokens.

        At 0 it is `auto`, at 1 diagonal in H.

        Raises:
            StatsError: for ``rho`` outside [0, 1].
        """
        if not 0 <= rho <= 1:
            raise StatsError(f"Metric.shrunk(rho={rho}) is outside [0, 1]; 0 keeps H, 1 keeps its diagonal only.")
        hessian = stats.hessian.double()
        side = hessian.diagonal().clone() if rho == 1 else (1 - rho) * hessian
        if rho < 1:
            side.diagonal().add_(rho * hessian.diagonal())
        return cls(side, None if stats.gradient is None else stats.gradient.second.double())

    @classmethod
    def fisher(cls, stats: LayerStats) -> Metric:
        """``G ⊗ H``: twice the predicted loss increase in nats.

        Raises:
            StatsError: if no gradients were calibrated.
        """
        if stats.gradient is None:
            raise StatsError(
                "these statistics hold no gradient moment G; calibrate with fisher=True, or use Metric.full."
            )
        return cls(stats.hessian.double(), stats.gradient.second.double())

    @classmethod
    def auto(cls, stats: LayerStats) -> Metric:
        """`fisher` where gradients were calibrated, else `full`."""
        return cls.full(stats) if stats.gradient is None else cls.fisher(stats)

    def times_hessian(self, matrix: Tensor) -> Tensor:
        """``matrix @ H`` for (..., n), in the dtype of ``matrix``."""
        return _apply(self.hessian, matrix.mT).mT

    def times_gradient(self, matrix: Tensor) -> Tensor:
        """``G @ matrix`` for (m, ...), in the dtype of ``matrix``."""
        return _apply(self.gradient, matrix)

    def squared_norm(self, error: Tensor) -> float:
        """``tr(Eᵀ G E H)``: products in the dtype of ``error``, at least float32; the sum in float64.

        Cost: ``2 m n (m + n)`` flops.
        """
        wide = error if error.dtype == torch.float64 else error.float()
        product = self.times_gradient(self.times_hessian(wide))
        return max(float((product.double() * wide.double()).sum()), 0.0)

    def norm(self, error: Tensor) -> float:
        """``sqrt(tr(Eᵀ G E H))``."""
        return math.sqrt(self.squared_norm(error))

    def relative(self, error: Tensor, weight: Tensor) -> float:
        """``norm(error) / norm(weight)``; 0 where both vanish."""
        size, reference = self.norm(error), self.norm(weight)
        return size / reference if reference > 0 else (0.0 if size == 0 else float("inf"))

    def nats(self, error: Tensor) -> float:
        """Predicted loss increase ``½ tr(Eᵀ G E H)`` in nats per token.

        Raises:
            StatsError: if the metric has no gradient side, so that its unit is not nats.
        """
        if self.gradient is None:
            raise StatsError("a metric without the gradient moment G has no price in nats; use Metric.fisher(stats).")
        return 0.5 * self.squared_norm(error)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Metric:
        """The same metric stored in another dtype, on another device."""
        return Metric(_to(self.hessian, dtype, device), _to(self.gradient, dtype, device))


def root(side: Tensor | None) -> Tensor | None:
    """A root ``S`` with ``S Sᵀ = side``: ``None``, (n,) or (n, n), float64; negative rounding is cut at 0."""
    if side is None:
        return None
    if side.ndim == 1:
        return side.double().clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(side.double())
    factor: Tensor = vectors * values.clamp_min(0).sqrt()
    return factor


def _apply(side: Tensor | None, matrix: Tensor) -> Tensor:
    if side is None:
        return matrix
    side = side.to(device=matrix.device, dtype=matrix.dtype)
    product: Tensor = side.unsqueeze(-1) * matrix if side.ndim == 1 else side @ matrix
    return product


def _to(side: Tensor | None, dtype: torch.dtype, device: torch.device | None) -> Tensor | None:
    return None if side is None else side.to(device=device or side.device, dtype=dtype)
