"""A weight in the metric over the modes of a network: what all local problems of a sweep share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnc.metric import Metric
from tnc.networks.kronecker import KroneckerMetric
from tnc.networks.modes import Modes, site_matrix, site_tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight in the metric, padded or not, with what every local problem needs.

    Attributes:
        weight: (m, n) float64.
        metric: full ``G ⊗ H``, float64.
        out_modes: d output modes.
        in_modes: d input modes.
    """

    weight: Tensor
    metric: Metric
    out_modes: Modes
    in_modes: Modes

    @cached_property
    def target(self) -> Tensor:
        """``G W H`` (m, n)."""
        return self.times(self.weight)

    @cached_property
    def energy(self) -> float:
        """``tr(Wᵀ G W H)``."""
        return max(float((self.target * self.weight).sum()), 0.0)

    @cached_property
    def kronecker(self) -> KroneckerMetric:
        """The nearest Kronecker-factored metric: the preconditioner of every local problem."""
        return KroneckerMetric.nearest(self.metric, self.weight, self.out_modes, self.in_modes)

    def times(self, matrix: Tensor) -> Tensor:
        """``G M H``; ``2 m n (m + n)`` flops."""
        return self.metric.times_gradient(self.metric.times_hessian(matrix))

    def matrix(self, sites: Tensor) -> Tensor:
        """(m, n) of a site tensor."""
        return site_matrix(sites, self.out_modes, self.in_modes, (self.weight.shape[0], self.weight.shape[1]))

    def sites(self, matrix: Tensor) -> Tensor:
        """Site tensor of an (m, n) matrix."""
        return site_tensor(matrix, self.out_modes, self.in_modes, torch.float64)
