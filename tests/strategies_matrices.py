"""Weights with statistics for property tests: strategies draw shapes, ranks, scales and a seed, not entries."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.metric import Metric
from tnc.stats import LayerStats, Moments

SIZES = st.integers(1, 13)
SCALES = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6])


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight (m, n) float64 with PSD H (n, n) and G (m, m) or None."""

    weight: Tensor
    H: Tensor
    G: Tensor | None
    seed: int

    @property
    def metric(self) -> Metric:
        return Metric(self.H, self.G)

    @property
    def limit(self) -> int:
        return min(self.weight.shape)

    def stats(self, *, heldout: bool = False) -> LayerStats:
        """Statistics with these moments; the held-out H is another draw."""
        n = self.weight.shape[1]
        other = Moments(psd(n, n, 1.0, generator(self.seed + 1)), None, 7) if heldout else None
        gradient = None if self.G is None else Moments(self.G, None, 50)
        return LayerStats(Moments(self.H, self.H.diagonal().sqrt() * 0.8, 50), other, gradient)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=g, dtype=torch.float64)


def psd(size: int, rank: int, scale: float, g: torch.Generator) -> Tensor:
    """A PSD matrix of the given rank as a mean of ``x xᵀ``, with one outlier channel."""
    x = gaussian(size, rank, g)
    x[size // 2] *= 5
    return scale * (x @ x.T) / max(rank, 1)


@st.composite
def problems(draw, *, sides=("H", "GH"), scales=SCALES, sizes=SIZES):
    """Any shape, weight, H and G of any rank from 0, any scale."""
    m, n = draw(sizes), draw(sizes)
    seed = draw(st.integers(0, 2**20))
    g = generator(seed)
    rank = draw(st.integers(0, min(m, n)))
    weight = draw(scales) * gaussian(m, rank, g) @ gaussian(rank, n, g)
    if draw(st.booleans()):
        weight = weight + float(weight.abs().max() if weight.numel() else 1) * 1e-3 * gaussian(m, n, g)
    H = psd(n, draw(st.integers(0, n + 3)), draw(scales), g)
    G = psd(m, draw(st.integers(0, m + 3)), draw(scales), g) if draw(st.sampled_from(sides)) == "GH" else None
    return Problem(weight, H, G, seed)


def well_conditioned(m: int, n: int, seed: int, *, fisher: bool = False) -> Problem:
    """A dense weight with H (and G) of condition number at most about 1e3."""
    g = generator(seed)
    G = psd(m, 4 * m, 1.0, g) if fisher else None
    return Problem(gaussian(m, n, g), psd(n, 4 * n, 1.0, g), G, seed)


def sym_root(matrix: Tensor) -> Tensor:
    """The symmetric PSD square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def oracle_sigma(weight: Tensor, H: Tensor, G: Tensor | None) -> Tensor:
    """Singular values of ``G^½ D H^½`` by symmetric roots and a plain SVD, all float64."""
    whitened = weight.double() @ sym_root(H.double())
    if G is not None:
        whitened = sym_root(G.double()) @ whitened
    return torch.linalg.svdvals(whitened)


def brute_squared_norm(error: Tensor, H: Tensor, G: Tensor | None) -> float:
    """``tr(Eᵀ G E H)`` entry by entry in float64."""
    E = error.double()
    weighted = E if G is None else G.double() @ E
    return float(torch.einsum("ij,ik,kj->", E, weighted, H.double()))


def whole(problem: Problem) -> float:
    """An upper bound of the norm of the weight that does not vanish by cancellation: the scale of rounding."""
    H, G, W = problem.H, problem.G, problem.weight
    side = 1.0 if G is None else float(G.norm())
    return (float(W.norm()) ** 2 * float(H.norm()) * side) ** 0.5
