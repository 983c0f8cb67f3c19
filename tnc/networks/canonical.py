"""Canonical forms: gauges in which all cores on one side of a centre are orthonormal; norm and inner product.

Everything runs in float64 and nothing builds the matrix. Padding is not part of the operator: where there is any,
norms and inner products first take it out with a projector of bond dimension 2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from tnc.errors import ShapeError, check_same_shape
from tnc.networks.algebra import add, scale, without_padding
from tnc.terms import Mpo, cast


def left_canonical(mpo: Mpo) -> Mpo:
    """The same operator with orthonormal cores but the last: ``Σ_{r o i} core[r, o, i, s] core[r, o, i, t] = δ_st``.

    Bonds wider than what is left of them shrink, so no bond stays above the bound of its left side. Computed and
    returned in float64: rounding would undo the orthogonality.
    """
    return mixed_canonical(mpo, len(mpo.cores) - 1)


def right_canonical(mpo: Mpo) -> Mpo:
    """The same operator with orthonormal cores but the first, float64."""
    return mixed_canonical(mpo, 0)


def mixed_canonical(mpo: Mpo, center: int) -> Mpo:
    """The same operator with cores before ``center`` left- and after it right-orthonormal, float64.

    Its Frobenius norm (padding included) is that of the centre core.

    Raises:
        ShapeError: if ``center`` is not the index of a core.
    """
    if not 0 <= center < len(mpo.cores):
        raise ShapeError(f"mixed_canonical(center={center}): expected 0 <= center < {len(mpo.cores)} cores.")
    cores = [core.double() for core in mpo.cores]
    for k in range(center):
        Q, R = torch.linalg.qr(cores[k].flatten(0, 2))
        cores[k] = Q.reshape(*cores[k].shape[:3], Q.shape[1])
        cores[k + 1] = torch.tensordot(R, cores[k + 1], dims=1)
    for k in range(len(cores) - 1, center, -1):
        Q, R = torch.linalg.qr(cores[k].flatten(1).mT)
        cores[k] = Q.mT.reshape(Q.shape[1], *cores[k].shape[1:])
        cores[k - 1] = torch.tensordot(cores[k - 1], R.mT, dims=1)
    return replace(mpo, cores=tuple(cores))


def norm(mpo: Mpo) -> float:
    """Frobenius norm of the operator (without padding), from a canonical form: exact to rounding.

    Cost: ``Σ 2 r_{k-1} o_k i_k r_k²`` flops, eight times as much with padding.
    """
    return float(left_canonical(without_padding(mpo)).cores[-1].norm())


def difference_norm(a: Mpo, b: Mpo) -> float:
    """Frobenius norm of ``a - b``, without the cancellation of ``<a, a> - 2 <a, b> + <b, b>``."""
    first = cast(a, torch.float64)
    second = cast(b, torch.float64)
    assert isinstance(first, Mpo) and isinstance(second, Mpo)
    return norm(add(first, scale(second, -1.0)))


def inner(a: Mpo, b: Mpo) -> float:
    """``tr(AᵀB)`` (without padding), by environments from the left.

    Raises:
        ShapeError: if the operators differ in shape or modes.
    """
    check_same_shape(a.shape, b.shape, "b", "a")
    check_same_shape((*b.out_modes, *b.in_modes), (*a.out_modes, *a.in_modes), "modes of b", "a")
    pairs = zip(a.cores, without_padding(b).cores, strict=True)
    environment: Tensor = reduce(_absorbed, pairs, torch.ones(1, 1, dtype=torch.float64, device=a.cores[0].device))
    return float(environment.sum())


def _absorbed(environment: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """(r_a, r_b) to the right of one more site."""
    a, b = (core.double() for core in pair)
    half = torch.tensordot(environment, b, dims=1)  # (r_a, o, i, s_b)
    absorbed: Tensor = torch.tensordot(a, half, dims=([0, 1, 2], [0, 1, 2]))
    return absorbed
