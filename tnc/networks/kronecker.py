"""The nearest Kronecker product of a metric over the modes of a network (Van Loan and Pitsianis 1993).

A full H mixes the input modes, so its root would destroy the structure of a network. ``H ≈ H_1 ⊗ ... ⊗ H_d`` does
not: each mode is whitened by a root of its own, and un-whitened core by core.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from string import ascii_letters

import torch
from torch import Tensor

from tnc.metric import Metric
from tnc.networks.modes import Modes
from tnc.terms import Mpo

_SWEEPS = 50
_SETTLED = 1e-10  # relative change of a factor at which the iteration ends
_UNSEEN = 1e-12  # eigenvalues below this share of the largest count as zero


@dataclass(frozen=True, eq=False)
class KroneckerMetric:
    """``(G_1 ⊗ ... ⊗ G_d) ⊗ (H_1 ⊗ ... ⊗ H_d)``, the factors symmetric positive semidefinite, float64.

    Attributes:
        gradient: d factors (o_k, o_k).
        hessian: d factors (i_k, i_k).
    """

    gradient: tuple[Tensor, ...]
    hessian: tuple[Tensor, ...]

    @classmethod
    def nearest(cls, metric: Metric, weight: Tensor, out_modes: Modes, in_modes: Modes) -> KroneckerMetric:
        """The Kronecker-factored metric nearest to ``metric`` in each of its two sides, where ``weight`` (m, n) is.

        Cost: ``O(sweeps d n²)``, no decomposition of the whole side.
        """
        sides = (metric.gradient, weight.shape[0], out_modes), (metric.hessian, weight.shape[1], in_modes)
        gradient, hessian = (tuple(f.to(weight.device) for f in nearest_kronecker(*side)) for side in sides)
        return cls(gradient, hessian)

    def whitened(self, sites: Tensor) -> Tensor:
        """``G_k^½ ⊗ H_k^½`` applied to every leg of a site tensor (o_1 i_1, ..., o_d i_d)."""
        for k, (g, h) in enumerate(zip(self.gradient, self.hessian, strict=True)):
            sites = _on_site(sites, k, symmetric_root(g), symmetric_root(h))
        return sites

    def on_cores(self, mpo: Mpo) -> Mpo:
        """`whitened` on the cores of an operator, float64."""
        return _on_cores(mpo, [symmetric_root(g) for g in self.gradient], [symmetric_root(h) for h in self.hessian])

    def unwhitened(self, mpo: Mpo) -> Mpo:
        """The inverse on the cores: ``G_k^-½`` and ``H_k^-½``, zero in directions that a factor does not see."""
        return _on_cores(mpo, [inverse_root(g) for g in self.gradient], [inverse_root(h) for h in self.hessian])


def nearest_kronecker(side: Tensor | None, features: int, modes: Modes) -> tuple[Tensor, ...]:
    """Factors ``A_k`` (n_k, n_k) that minimize ``||side - A_1 ⊗ ... ⊗ A_d||_F``, each positive semidefinite.

    Higher-order power iteration from the partial traces: each step contracts the side with the other factors, which
    keeps symmetry and semidefiniteness (so does the best approximation, Van Loan and Pitsianis 1993, theorem 5.8). For
    two modes it converges to the global optimum, for more to a stationary point.

    Args:
        side: ``None`` (identity), (n,) (diagonal) or (n, n), positive semidefinite.
        features: n; padding up to ``prod(modes)`` has weight zero, except for the identity.
        modes: d modes.

    Returns:
        d factors, float64; the scale is in the first. A zero side gives identities: all directions are alike.
    """
    identities = tuple(torch.eye(mode, dtype=torch.float64) for mode in modes)
    if side is None or not bool(side.any()):
        return identities
    identities = tuple(identity.to(side.device) for identity in identities)
    diagonal = side.ndim == 1
    legs = _mode_legs(side, features, modes)
    factors = [identity.diagonal() if diagonal else identity for identity in identities]
    factors = [factor / factor.norm() for factor in factors]
    for _ in range(_SWEEPS if len(modes) > 1 else 1):
        change = 0.0
        for k in range(len(modes)):
            found = _contracted(legs, factors, k, diagonal)
            scale = found.norm()
            change = max(change, float((found / scale - factors[k]).norm()))
            factors[k] = found / scale
        if change <= _SETTLED:
            break
    factors[0] = _contracted(legs, factors, 0, diagonal)
    return tuple(torch.diag(f) if diagonal else (f + f.T) / 2 for f in factors)


def symmetric_root(factor: Tensor) -> Tensor:
    """``A^½``, symmetric; negative rounding is cut at 0."""
    values, vectors = torch.linalg.eigh(factor)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def inverse_root(factor: Tensor) -> Tensor:
    """``A^-½`` on the directions that ``A`` sees, zero on the others."""
    values, vectors = torch.linalg.eigh(factor)
    seen = values > _UNSEEN * values[-1:].clamp_min(0)
    inverse = torch.where(seen, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    root: Tensor = (vectors * inverse) @ vectors.T
    return root


def _mode_legs(side: Tensor, features: int, modes: Modes) -> Tensor:
    """(n_1, ..., n_d) of a diagonal, (n_1, ..., n_d, n_1, ..., n_d) of a matrix, padded with zeros."""
    full = prod(modes)
    padded = torch.zeros((full,) * side.ndim, dtype=torch.float64, device=side.device)
    padded[tuple(slice(0, features) for _ in range(side.ndim))] = side.double()
    return padded.reshape(modes * side.ndim)


def _contracted(legs: Tensor, factors: list[Tensor], k: int, diagonal: bool) -> Tensor:
    """The side contracted with all factors but the k-th."""
    d = len(factors)
    rows, columns = ascii_letters[:d], ascii_letters[d : 2 * d]
    whole = rows if diagonal else rows + columns
    labels = [rows[j] if diagonal else rows[j] + columns[j] for j in range(d)]
    others = [j for j in range(d) if j != k]
    for j in others:  # one at a time: the tensor shrinks with each
        left = "".join(letter for letter in whole if letter not in labels[j])
        legs = torch.einsum(f"{whole},{labels[j]}->{left}", legs, factors[j])
        whole = left
    return legs


def _on_cores(mpo: Mpo, lefts: list[Tensor], rights: list[Tensor]) -> Mpo:
    triples = zip(mpo.cores, lefts, rights, strict=True)
    return Mpo(tuple(torch.einsum("po,aoib,iq->apqb", l, core.double(), r) for core, l, r in triples), mpo.features)


def _on_site(sites: Tensor, k: int, left: Tensor, right: Tensor) -> Tensor:
    """``left`` and ``right`` applied to the output and input leg of site k."""
    before, after = prod(sites.shape[:k]), prod(sites.shape[k + 1 :])
    legs = sites.reshape(before, left.shape[0], right.shape[0], after)
    legs = torch.einsum("po,xoiy,iq->xpqy", left.to(sites), legs, right.to(sites))
    return legs.reshape(sites.shape)
