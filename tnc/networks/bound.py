"""What no matrix product operator of given bonds can beat."""

from __future__ import annotations

from functools import reduce
from math import prod

import torch
from torch import Tensor

from tnc.metric import Metric
from tnc.networks.kronecker import KroneckerMetric, inverse_root
from tnc.networks.modes import site_tensor
from tnc.terms import Mpo

SIDE_LIMIT = 4096  # smaller side of an unfolding, and side of a metric, whose spectrum is still computed


def mpo_lower_bound(weight: Tensor, mpo: Mpo, metric: Metric) -> tuple[float, str | None]:
    """Smallest error, in ``metric``, of any operator with the modes and bond dimensions of ``mpo``.

    In the Frobenius norm it is the largest tail of a single unfolding (Eckart and Young). In a Kronecker-factored
    metric K the same holds for the whitened unfoldings, and any other metric is at least ``c K`` with c the
    smallest eigenvalue of ``K^-½ (G ⊗ H) K^-½``: the bound is exact for Kronecker-factored metrics and small, but true,
    for others.

    Returns:
        The bound (absolute, not squared, its rounding taken off), and a note where it is 0 for want of one.

    Cost: an eigenproblem of the smaller side of every unfolding and of both sides of the metric.
    """
    sites = [o * i for o, i in zip(mpo.out_modes, mpo.in_modes, strict=True)]
    sides = [min(prod(sites[:k]), prod(sites[k:])) for k in range(1, len(sites))]
    if not sides:
        return 0.0, None
    if mpo.padded:
        return 0.0, "lower bound not computed: the padding of the operator is free"
    if max(*sides, *weight.shape) > SIDE_LIMIT:
        return 0.0, f"lower bound not computed: an unfolding or a side of the metric is above {SIDE_LIMIT}"
    metric = metric.to(torch.float64, weight.device)
    kronecker = KroneckerMetric.nearest(metric, weight, mpo.out_modes, mpo.in_modes)
    share = _share(metric.gradient, kronecker.gradient) * _share(metric.hessian, kronecker.hessian)
    whitened = kronecker.whitened(site_tensor(weight, mpo.out_modes, mpo.in_modes, torch.float64))
    rounding = sum(whitened.shape) * torch.finfo(torch.float64).eps * float(whitened.norm()) ** 2
    tails = [_tail(whitened.reshape(prod(sites[:k]), -1), mpo.ranks[k]) for k in range(1, len(sites))]
    return (share * max(max(tails) - rounding, 0.0)) ** 0.5, None


def _share(side: Tensor | None, factors: tuple[Tensor, ...]) -> float:
    """Largest c with ``side - c (A_1 ⊗ ... ⊗ A_d)`` semidefinite; 0 where the product is singular."""
    if side is None:
        return 1.0
    if any(float(torch.linalg.eigvalsh(a)[0]) <= 1e-12 * float(a.norm()) for a in factors):
        return 0.0
    root = reduce(torch.kron, [inverse_root(a) for a in factors])
    dense = torch.diag(side) if side.ndim == 1 else side
    whitened = root @ dense.double() @ root
    smallest = float(torch.linalg.eigvalsh((whitened + whitened.T) / 2)[0])
    return max(smallest - 1e-12 * float(whitened.norm()), 0.0)


def _tail(unfolding: Tensor, rank: int) -> float:
    wide = unfolding if unfolding.shape[0] <= unfolding.shape[1] else unfolding.T
    values = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0)
    return float(values[rank:].sum())
