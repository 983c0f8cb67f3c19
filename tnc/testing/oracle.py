"""Float64 oracles, written from the definitions and sharing no code with the solvers they judge.

``D`` is a weight (m, n), ``G`` and ``H`` the sides of a metric as dense matrices, ``^½`` the symmetric root.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from tnc.metric import Metric
from tnc.terms import Expression, Product, Sum, dense64, map_tensors


def eckart_young(weight: Tensor, metric: Metric) -> Tensor:
    """Singular values of ``G^½ D H^½`` (min(m, n),), descending, by a dense SVD.

    No matrix of rank k is closer to ``D`` in the metric than ``sqrt(sum(values[k:]**2))`` (Eckart and Young
    1936). The roots make the values exact to about ``1e-8 ||D|| sqrt(||G|| ||H||)``, not to rounding.
    """
    values: Tensor = torch.linalg.svdvals(_whitened(weight, metric))
    return values


def error_in(metric: Metric, error: Tensor) -> float:
    """``||G^½ E H^½||_F``, the square root of ``tr(Eᵀ G E H)``."""
    return float(_whitened(error, metric).norm())


def largest_gain(metric: Metric) -> float:
    """``sqrt(||G|| ||H||)`` in spectral norms: what the metric makes of a unit matrix at most."""
    return math.sqrt(_spectral_norm(metric.gradient) * _spectral_norm(metric.hessian))


def storage_rounding(term: Expression) -> float:
    """Frobenius norm that rounding every stored number of ``term`` once can move it by.

    The coarsest machine epsilon stored, times the norm of `magnitude`.
    """
    floats = [t for t in term.tensors().values() if t.is_floating_point()]
    epsilon = max((torch.finfo(t.dtype).eps for t in floats), default=0.0)
    return epsilon * float(magnitude(term).norm())


def magnitude(term: Expression) -> Tensor:
    """Entrywise bound (m, n) float64 on the sum of absolute products behind each entry of ``term``.

    Leaves are evaluated on ``|t| + tiny`` in place of every stored t.
    """
    if isinstance(term, Sum):
        return torch.stack([magnitude(t) for t in term.terms]).sum(0)
    if isinstance(term, Product):
        return reduce(torch.matmul, [magnitude(t) for t in term.terms])
    return dense64(map_tensors(term, _absolute)).abs()


def _absolute(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.double().abs() + torch.finfo(tensor.dtype).tiny  # subnormals round by eps * tiny


def _whitened(matrix: Tensor, metric: Metric) -> Tensor:
    right = _times(_symmetric_root(metric.hessian), matrix.double().T).T
    return _times(_symmetric_root(metric.gradient), right)


def _symmetric_root(side: Tensor | None) -> Tensor | None:
    if side is None:
        return None
    dense = torch.diag(side.double()) if side.ndim == 1 else side.double()
    values, vectors = torch.linalg.eigh(dense)
    root: Tensor = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _times(side: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix if side is None else side @ matrix


def _spectral_norm(side: Tensor | None) -> float:
    if side is None:
        return 1.0
    return float(side.double().abs().max() if side.ndim == 1 else torch.linalg.matrix_norm(side.double(), 2))
