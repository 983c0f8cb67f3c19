"""A certificate for quantizers: no codes on a given grid can do better than this."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tnc.errors import check_same_shape
from tnc.quant.grid import Grid, check_quantizable
from tnc.terms import Quantized

_WELL_CONDITIONED = 1e-10  # smallest eigenvalue of the scaled H from which its inverse is used for a candidate


def grid_lower_bound(weight: Tensor, grid: Grid | Quantized, hessian: Tensor) -> float:
    """Lower bound on ``||W - Q||_H²`` over all assignments of codes on the given scales and zeros.

    For any diagonal ``D >= 0`` with ``H - D`` positive semidefinite, ``||E||_H² >= sum_j D_jj |E_j|²``, and
    each entry of E is at least its distance to the nearest grid point. ``D = t diag(d)`` with t the smallest
    eigenvalue of ``diag(d)^{-1/2} H diag(d)^{-1/2}``; the best of d = 1, ``diag(H)`` and ``1 / diag(H^{-1})``
    is taken (the last where H is well conditioned). Columns with ``H_jj = 0`` cost nothing and are left out.
    Exact for diagonal H; 0 where the rest of H is singular, as with fewer tokens than columns.

    Args:
        weight: (m, n) finite, any float dtype.
        grid: the grid, or a term whose grid is meant (its codes do not matter).
        hessian: (n, n) positive semidefinite, or (n,) for a diagonal H.

    Returns:
        The bound, squared as ``Metric.squared_norm``, with the rounding of the eigenvalues taken off.

    Raises:
        ShapeError: if the three shapes do not agree.

    Cost: three eigenvalue problems of H, float64.
    """
    grid = Grid.of(grid) if isinstance(grid, Quantized) else grid
    check_quantizable(weight, grid.format, None)
    features = weight.shape[1]
    check_same_shape(hessian.shape, (features,) * hessian.ndim, "hessian", f"weight {tuple(weight.shape)}")
    squared = grid.least_squared_errors(weight)  # of each column
    hessian = hessian.to(weight.device, torch.float64)
    slack = features * torch.finfo(torch.float64).eps
    if hessian.ndim == 1:
        return float(hessian.clamp_min(0) @ squared) * (1 - slack)
    live = hessian.diagonal() > 0
    if not bool(live.any()):
        return 0.0
    hessian, squared = hessian[live][:, live], squared[live]
    return max(_bound(hessian, d, squared, slack) for d in _candidates(hessian))


def _candidates(hessian: Tensor) -> Iterator[Tensor]:
    diagonal = hessian.diagonal()
    yield torch.ones_like(diagonal)
    yield diagonal
    root = diagonal.sqrt()
    scaled = hessian / torch.outer(root, root)
    lower, info = torch.linalg.cholesky_ex(scaled)
    if int(info) == 0 and float(lower.diagonal().min()) ** 2 > _WELL_CONDITIONED:
        yield diagonal / torch.cholesky_inverse(lower).diagonal()


def _bound(hessian: Tensor, d: Tensor, squared: Tensor, slack: float) -> float:
    root = d.sqrt()
    values = torch.linalg.eigvalsh(hessian / torch.outer(root, root))
    smallest = float(values[0] - 4 * slack * values[-1])  # backward error of eigvalsh, and of the sums below
    return max(smallest, 0.0) * float(d @ squared) * (1 - slack)
