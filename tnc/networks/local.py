"""The local problem of a sweep: the best core at one place, all others fixed, in the full metric ``G ⊗ H``.

With the other cores folded into orthonormal environments L and R the operator is linear in the core, and
``tr((W - Ŵ)ᵀ G (W - Ŵ) H)`` is a quadratic in it. Its normal matrix is never formed where it is large: it is applied
by building ``Ŵ``, multiplying with G and H, and projecting back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from tnc.networks.layer import Layer
from tnc.networks.modes import Modes

DIRECT_LIMIT = 2048  # unknowns of an independent block up to which its normal matrix is factored
_STEPS = 40  # of conjugate gradients
_ACCURACY = 1e-4  # relative preconditioned residual at which they stop
_UNSEEN = 1e-10  # directions that the preconditioner leaves alone, relative to the largest


@dataclass(frozen=True, eq=False)
class Local:
    """One core ``(a, o, i, b)`` (or several merged) between fixed environments.

    Attributes:
        layer: the problem.
        left: (sites before, a), orthonormal columns.
        right: (b, sites after), orthonormal rows.
        first: first site of the core.
        count: sites in the core.
        left_weight: (a, a) Gram matrix of ``left`` in the Kronecker-factored metric, for the preconditioner.
        right_weight: (b, b) the same of ``right``.
    """

    layer: Layer
    left: Tensor
    right: Tensor
    first: int
    count: int
    left_weight: Tensor
    right_weight: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(a, sites of the core, b)."""
        middle = slice(self.first, self.first + self.count)
        return self.left.shape[1], prod((*self.layer.out_modes[middle], *self.layer.in_modes[middle])), len(self.right)

    def expand(self, core: Tensor) -> Tensor:
        """(m, n) operator of a core (a, s, b); ``2 m n min(a, b)`` flops or so."""
        a, s, b = self.sizes
        chain = (self.left @ core.reshape(a, s * b)).reshape(-1, b) @ self.right
        return self.layer.matrix(chain)

    def project(self, matrix: Tensor) -> Tensor:
        """The adjoint of `expand`: (a, s, b)."""
        a, s, b = self.sizes
        sites = self.layer.sites(matrix).reshape(-1, self.right.shape[1]) @ self.right.T
        return (self.left.T @ sites.reshape(len(self.left), s * b)).reshape(a, s, b)

    def normal(self, core: Tensor) -> Tensor:
        """The normal matrix applied to a core."""
        return self.project(self.layer.times(self.expand(core)))

    @cached_property
    def target(self) -> Tensor:
        """Right-hand side of the normal equations."""
        return self.project(self.layer.target)

    def error(self, core: Tensor, image: Tensor | None = None) -> float:
        """``tr((W - Ŵ)ᵀ G (W - Ŵ) H)`` of a core; ``image`` is ``normal(core)`` where it is known."""
        image = self.normal(core) if image is None else image
        return max(self.layer.energy + float((core * (image - 2 * self.target)).sum()), 0.0)

    def solve(self, start: Tensor) -> Tensor:
        """A core at least as good as ``start``: exact where independent blocks are small, else conjugate gradients."""
        if self._independent and self.sizes[0] * self._in_size * self.sizes[2] <= DIRECT_LIMIT:
            found = self._direct()
            return found if self.error(found) <= self.error(start) else start
        return self._conjugate_gradients(start)

    @property
    def _in_size(self) -> int:
        return prod(self.layer.in_modes[self.first : self.first + self.count])

    @property
    def _independent(self) -> bool:
        """Without G, and without padded rows, every output index of the core has the same normal matrix."""
        layer = self.layer
        return layer.metric.gradient is None and prod(layer.out_modes) == len(layer.weight) and self.count == 1

    def _direct(self) -> Tensor:
        """Cholesky of the (a i b) x (a i b) normal matrix that all output indices share; least squares if singular."""
        a, s, b = self.sizes
        out, into = self.layer.out_modes[self.first], self.layer.in_modes[self.first]
        normal = self._shared_normal().reshape(a * into * b, a * into * b)
        rows = self.target.reshape(a, out, into, b).permute(1, 0, 2, 3).reshape(out, a * into * b)
        factor, failed = torch.linalg.cholesky_ex(normal)
        if bool(failed) or float(factor.diagonal().min()) < 1e-6 * float(factor.diagonal().max()):
            solved: Tensor = rows @ torch.linalg.pinv(normal, hermitian=True, rtol=1e-13)
        else:
            solved = torch.cholesky_solve(rows.T, factor).T
        return solved.reshape(out, a, into, b).permute(1, 0, 2, 3).reshape(a, s, b)

    def _shared_normal(self) -> Tensor:
        """(a, i, b, a, i, b): H contracted with the output-traced environments; ``2 n² b²`` flops."""
        k, layer = self.first, self.layer
        before, after = layer.in_modes[:k], layer.in_modes[k + 1 :]
        lefts = by_side(self.left.T, layer.out_modes[:k], before)  # (a, outs, ins)
        rights = by_side(self.right, layer.out_modes[k + 1 :], after)
        left = torch.einsum("aox,boy->axby", lefts, lefts)
        right = torch.einsum("aox,boy->axby", rights, rights)
        full = prod(layer.in_modes)
        hessian = torch.zeros(full, full, dtype=torch.float64, device=self.left.device)
        n = layer.weight.shape[1]
        side = layer.metric.hessian
        hessian[:n, :n] = torch.eye(n) if side is None else torch.diag(side) if side.ndim == 1 else side
        legs = hessian.reshape(
            prod(before), layer.in_modes[k], prod(after), prod(before), layer.in_modes[k], prod(after)
        )
        half = torch.einsum("xizyjw,czdw->xicyjd", legs, right)
        return torch.einsum("axby,xicyjd->aicbjd", left, half)

    def _conjugate_gradients(self, start: Tensor) -> Tensor:
        """Preconditioned conjugate gradients from ``start``: the error falls with every step."""
        core = start
        residual = self.target - self.normal(core)
        step = self._preconditioned(residual)
        direction, slope = step, float((residual * step).sum())
        stop = _ACCURACY**2 * max(float((self.target * self._preconditioned(self.target)).sum()), 0.0)
        for _ in range(_STEPS):
            if slope <= stop:
                break
            image = self.normal(direction)
            curvature = float((direction * image).sum())
            if curvature <= 0:
                break
            core = core + (slope / curvature) * direction
            residual = residual - (slope / curvature) * image
            step = self._preconditioned(residual)
            before, slope = slope, float((residual * step).sum())
            direction = step + (slope / before) * direction
        return core

    @cached_property
    def _inverses(self) -> tuple[Tensor, list[Tensor], Tensor]:
        kronecker = self.layer.kronecker
        middle = range(self.first, self.first + self.count)
        legs = [factor for k in middle for factor in (kronecker.gradient[k], kronecker.hessian[k])]
        return _inverse(self.left_weight), [_inverse(leg) for leg in legs], _inverse(self.right_weight)

    def _preconditioned(self, core: Tensor) -> Tensor:
        """The inverse of the normal matrix of the Kronecker-factored metric: one small matrix a leg."""
        left, legs, right = self._inverses
        a, s, b = self.sizes
        solved = (left @ core.reshape(a, s * b)).reshape(a * s, b) @ right
        before, rest = a, s
        for leg in legs:
            rest = rest // len(leg)
            solved = leg @ solved.reshape(before, len(leg), rest * b)
            before *= len(leg)
        return solved.reshape(a, s, b)


def by_side(environment: Tensor, outs: Modes, ins: Modes) -> Tensor:
    """An environment (r, o_1 i_1 ...) as (r, outputs, inputs)."""
    d = len(outs)
    legs = environment.reshape([len(environment), *(size for pair in zip(outs, ins, strict=True) for size in pair)])
    order = [0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2)]
    return legs.permute(order).reshape(len(environment), prod(outs), prod(ins))


def _inverse(weight: Tensor) -> Tensor:
    """Inverse of a semidefinite matrix with its unseen directions treated as the least seen one: still definite."""
    values, vectors = torch.linalg.eigh(weight)
    floor = _UNSEEN * float(values[-1]) if len(values) and float(values[-1]) > 0 else 1.0
    inverse: Tensor = (vectors / values.clamp_min(floor)) @ vectors.T
    return inverse
