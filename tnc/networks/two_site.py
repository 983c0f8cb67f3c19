"""Two neighbouring cores at a time: the sweep that finds its own bond dimensions (DMRG with two sites)."""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.errors import BudgetError
from tnc.metric import Metric
from tnc.networks.als import als, layer_of, local_problem, relative_error, stored_like
from tnc.networks.canonical import mixed_canonical
from tnc.networks.kronecker import inverse_root, symmetric_root
from tnc.networks.layer import Layer
from tnc.networks.local import Local
from tnc.networks.tt_svd import check_eps
from tnc.stats import LayerStats
from tnc.terms import Mpo


def adapt_ranks(
    weight: Tensor, mpo: Mpo, *, eps: float, stats: LayerStats | None = None, metric: Metric | None = None,
    max_rank: int | None = None, sweeps: int = 2,
) -> Mpo:  # fmt: skip
    """An operator over the same modes with the smallest bonds found that keep a relative error in the full metric.

    Each step merges two cores, solves for both in ``G ⊗ H``, splits them again in the Kronecker-factored metric and
    keeps the fewest directions with which the error **in the full metric** is still at most
    ``eps * norm(weight)``. A one-site sweep follows each two-site sweep. Of all operators met on the way, the smallest
    one within the tolerance as stored is returned.

    Args:
        weight: (out_features, in_features).
        mpo: start; its bonds may grow as well as shrink.
        eps: relative error allowed in the metric, in [0, 1).
        stats: as in `als`.
        metric: as in `als`.
        max_rank: limit of every bond; ``None`` is no limit.
        sweeps: two-site sweeps, at least 1.

    Raises:
        BudgetError: if no operator within the tolerance was found: says what was reached.
        StatsError, ShapeError: as in `als`.

    Cost: a two-site solve costs what `als` pays for one core, and each bond about eight products with the metric more.
    """
    if sweeps < 1:
        raise BudgetError(f"adapt_ranks(sweeps={sweeps}): expected at least 1.")
    eps = check_eps(eps, "adapt_ranks")
    layer = layer_of(weight, mpo, stats, metric)
    met = [mpo]
    for _ in range(sweeps):
        cores = list(mixed_canonical(met[-1], 0).cores)
        for k in range(len(cores) - 1):
            cores[k], cores[k + 1] = _split(layer, cores, k, eps**2 * layer.energy, max_rank)
        met.append(stored_like(mpo, cores))
        met.append(als(weight, met[-1], metric=layer.metric, sweeps=1).mpo)
    errors = [relative_error(layer, found) for found in met]
    within = [found for found, error in zip(met, errors, strict=True) if error <= eps]
    if not within:
        raise BudgetError(
            f"adapt_ranks(eps={eps}, max_rank={max_rank}) reached a relative error of {min(errors):.4g} in "
            f"{mpo.cores[0].dtype}; raise eps or max_rank, start from an operator of larger bonds, or store it wider."
        )
    return min(within, key=lambda found: found.params)


def _split(layer: Layer, cores: list[Tensor], k: int, allowed: float, max_rank: int | None) -> tuple[Tensor, Tensor]:
    """Both cores at bond k + 1 solved together and split; the left one orthonormal."""
    local = local_problem(layer, cores, k, 2)
    a, _, b = local.sizes
    left, right = cores[k], cores[k + 1]
    merged = torch.tensordot(left, right, dims=1).reshape(local.sizes)
    merged = local.solve(merged).reshape(left[..., 0].numel(), right[0].numel())
    basis, rest = _directions(local, merged, left.shape, right.shape)
    most = len(rest) if max_rank is None else min(max_rank, len(rest))
    rank = _fewest(local, basis, rest, most, allowed)
    Q, R = torch.linalg.qr(basis[:, :rank])
    kept = R @ rest[:rank]
    return Q.reshape(a, *left.shape[1:3], Q.shape[1]), kept.reshape(len(kept), *right.shape[1:3], b)


def _directions(local: Local, merged: Tensor, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Factors (a o i, r) and (r, o i b) of the merged cores in order of weight in the Kronecker-factored metric."""
    kronecker, k = local.layer.kronecker, local.first
    weights = [local.left_weight, kronecker.gradient[k], kronecker.hessian[k]]
    others = [kronecker.gradient[k + 1], kronecker.hessian[k + 1], local.right_weight]
    whitened = _on_legs([symmetric_root(w) for w in weights], merged)
    whitened = _on_legs([symmetric_root(w) for w in others], whitened.T.contiguous()).T
    U, s, Vh = torch.linalg.svd(whitened, full_matrices=False)
    basis = _on_legs([inverse_root(w) for w in weights], U.contiguous())
    rest = _on_legs([inverse_root(w) for w in others], (s[:, None] * Vh).T.contiguous()).T
    return basis, rest


def _on_legs(matrices: list[Tensor], tall: Tensor) -> Tensor:
    """A Kronecker product of square matrices times (product of their sizes, r)."""
    before, rest = 1, tall.numel()
    result = tall
    for matrix in matrices:
        rest = rest // len(matrix)
        result = matrix @ result.reshape(before, len(matrix), rest)
        before *= len(matrix)
    return result.reshape(tall.shape)


def _fewest(local: Local, basis: Tensor, rest: Tensor, most: int, allowed: float) -> int:
    """Fewest directions within ``allowed`` in the full metric, by bisection; ``most`` if none are."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        core = (basis[:, :middle] @ rest[:middle]).reshape(local.sizes)
        if local.error(core) <= allowed:
            high = middle
        else:
            low = middle + 1
    return high
