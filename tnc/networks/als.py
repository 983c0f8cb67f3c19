"""Alternating least squares in the full metric: one core at a time, between orthonormal environments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.errors import BudgetError, StatsError, check_matrix, check_same_shape
from tnc.metric import Metric
from tnc.networks.canonical import mixed_canonical
from tnc.networks.layer import Layer
from tnc.networks.local import Local
from tnc.stats import LayerStats
from tnc.terms import Mpo


@dataclass(frozen=True, eq=False)
class AlsFit:
    """The operator and how its error fell.

    Attributes:
        mpo: as stored, in the dtype of the operator given.
        errors: relative error in the metric, of the operator given and after every sweep, float64 before storage.
    """

    mpo: Mpo
    errors: tuple[float, ...]


def als(
    weight: Tensor, mpo: Mpo, *, stats: LayerStats | None = None, metric: Metric | None = None, sweeps: int = 2
) -> AlsFit:
    """Lower ``tr((W - Ŵ)ᵀ G (W - Ŵ) H)`` of an operator without changing its bond dimensions.

    A sweep goes from the first core to the last and back (DMRG with one site). Each core is solved for exactly, by a
    Cholesky factorization shared by its output indices, where there is no G and the block is small, else by
    conjugate gradients preconditioned with the Kronecker-factored metric; the error never rises.

    Args:
        weight: (out_features, in_features).
        mpo: start, for example of `tt_svd` with ``metric=``.
        stats: statistics of the layer; the metric is ``G ⊗ H`` where gradients were calibrated, else ``H``.
        metric: used instead of ``stats`` where given.
        sweeps: at least 1.

    Raises:
        StatsError: if neither statistics nor a metric are given, or they are of another layer.
        ShapeError: if the operator has another shape than the weight.
        BudgetError: if ``sweeps`` is less than 1.

    Cost: in float64, a step of conjugate gradients takes ``2 m n (m + n + 2 r)`` flops, at most 40 a core.
    """
    if sweeps < 1:
        raise BudgetError(f"als(sweeps={sweeps}): expected at least 1.")
    layer = layer_of(weight, mpo, stats, metric)
    cores = list(mixed_canonical(mpo, 0).cores)
    errors = [relative_error(layer, mpo)]
    best, least = mpo, errors[0]
    for _ in range(sweeps):
        for k, forward in _there_and_back(len(cores)):
            cores[k] = best_core(layer, cores, k)
            shift(cores, k, forward=forward)
        found = stored_like(mpo, cores)
        errors.append(relative_error(layer, replace(mpo, cores=tuple(cores))))
        now = relative_error(layer, found)
        if now < least:
            best, least = found, now
    return AlsFit(best, tuple(errors))


def layer_of(weight: Tensor, mpo: Mpo, stats: LayerStats | None, metric: Metric | None) -> Layer:
    """The problem in float64, checked.

    Raises:
        StatsError, ShapeError, NonFiniteError: as in `als`.
    """
    check_matrix(weight, "weight")
    check_same_shape(mpo.shape, (weight.shape[0], weight.shape[1]), "mpo", "weight")
    if metric is None:
        if stats is None:
            raise StatsError("als needs calibration statistics or a metric; pass stats=..., or metric=Metric().")
        stats.check_weight(weight)
        metric = Metric.auto(stats)
    return Layer(weight.double(), metric.to(torch.float64, weight.device), mpo.out_modes, mpo.in_modes)


def relative_error(layer: Layer, mpo: Mpo) -> float:
    """Relative error in the metric, the cores taken in float64."""
    wide = Mpo(tuple(core.double() for core in mpo.cores), mpo.features)
    return layer.metric.relative(layer.weight - wide.to_dense(), layer.weight)


def stored_like(mpo: Mpo, cores: list[Tensor]) -> Mpo:
    """Cores in the dtype of ``mpo``."""
    dtype = mpo.cores[0].dtype
    return replace(mpo, cores=tuple(core.to(dtype).contiguous() for core in cores))


def local_problem(layer: Layer, cores: list[Tensor], first: int, count: int) -> Local:
    """The problem of the ``count`` cores from ``first`` on; cores before are left-, cores after right-orthonormal."""
    one = torch.ones(1, 1, dtype=torch.float64, device=layer.weight.device)
    left, left_weight = one, one
    for k in range(first):
        left = (left @ cores[k].flatten(1)).reshape(-1, cores[k].shape[3])
        left_weight = _weighed(layer, cores[k], k, left_weight)
    right, right_weight = one, one
    for k in range(len(cores) - 1, first + count - 1, -1):
        right = (cores[k].flatten(0, 2) @ right).reshape(cores[k].shape[0], -1)
        right_weight = _weighed(layer, cores[k].permute(3, 1, 2, 0), k, right_weight)
    return Local(layer, left, right, first, count, left_weight, right_weight)


def best_core(layer: Layer, cores: list[Tensor], k: int) -> Tensor:
    """The best core k between the others as they are, at least as good as the present one."""
    local = local_problem(layer, cores, k, 1)
    found: Tensor = local.solve(cores[k].reshape(local.sizes)).reshape(cores[k].shape)
    return found


def _weighed(layer: Layer, core: Tensor, k: int, environment: Tensor) -> Tensor:
    """(a, a) to (b, b): the Gram matrix of the environment in the Kronecker-factored metric, one site further."""
    g, h = layer.kronecker.gradient[k], layer.kronecker.hessian[k]
    half = torch.tensordot(environment, core, dims=1)
    half = torch.einsum("po,aoib,iq->apqb", g, half, h)
    weighed: Tensor = torch.tensordot(core, half, dims=([0, 1, 2], [0, 1, 2]))
    return (weighed + weighed.T) / 2


def _there_and_back(d: int) -> Iterator[tuple[int, bool]]:
    """Every core but the last on the way right, every one but the first on the way left; a lone core once."""
    yield from ((k, True) for k in range(max(d - 1, 1)))
    yield from ((k, False) for k in range(d - 1, 0, -1))


def shift(cores: list[Tensor], k: int, *, forward: bool) -> None:
    """Move the centre from core k to its neighbour; at the ends it stays."""
    if forward and k < len(cores) - 1:
        Q, R = torch.linalg.qr(cores[k].flatten(0, 2))
        cores[k] = Q.reshape(*cores[k].shape[:3], Q.shape[1])
        cores[k + 1] = torch.tensordot(R, cores[k + 1], dims=1)
    if not forward and k > 0:
        Q, R = torch.linalg.qr(cores[k].flatten(1).mT)
        cores[k] = Q.mT.reshape(Q.shape[1], *cores[k].shape[1:])
        cores[k - 1] = torch.tensordot(cores[k - 1], R.mT, dims=1)
