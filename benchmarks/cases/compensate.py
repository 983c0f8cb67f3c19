"""Rank-64 compensation of a quantization residual: the textbook way, the exact path, subspace iteration.

The weight has outlier-free Gaussian entries, the base is int3 group 64, and H has a power-law spectrum with
a random eigenbasis and 1 % outlier channels of ten times the size, as activations of language models have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Problem, case
from tnc import Exact, IntFormat, LayerStats, LowRank, Metric, Subspace, compensate, rtn, spectrum, truncated_svd
from tnc.terms import dense64

_RANK = 64


def textbook(residual: Tensor, hessian: Tensor, rank: int) -> LowRank:
    """Symmetric root of H by eigh, SVD of the whitened residual, un-whitening by the inverse root; float64."""
    values, vectors = torch.linalg.eigh(hessian)
    root = (vectors * values.clamp_min(1e-12).sqrt()) @ vectors.T
    inverse = (vectors / values.clamp_min(1e-12).sqrt()) @ vectors.T
    U, s, Vh = torch.linalg.svd(residual.double() @ root, full_matrices=False)
    return LowRank(U[:, :rank] * s[:rank], Vh[:rank] @ inverse)


def problem(size: int, seed: int = 0) -> tuple[Tensor, Any, LayerStats]:
    """Weight, int3 base and statistics of a square layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator) * size**-0.5
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    scales = torch.arange(1, size + 1, dtype=torch.float32) ** -0.5
    outliers = 1 + 9.0 * (torch.rand(size, generator=generator) < 0.01)
    root = (outliers.unsqueeze(1) * basis) * scales
    stats = LayerStats.from_hessian((root @ root.T).double(), tokens=4 * size)
    return weight, rtn(weight, IntFormat(3, group_size=64), clip_ratios=(1.0,)), stats


def _build(size: int, *, repeats: int) -> Problem:
    weight, base, stats = problem(size)
    residual = weight.double() - dense64(base)
    residual32, metric = residual.float(), Metric.full(stats)
    optimum = float(spectrum(residual, metric)[_RANK:].norm())
    return Problem(
        ways={
            "textbook float64": lambda: textbook(residual, stats.hessian, _RANK),
            "tnc exact, residual given": lambda: truncated_svd(residual32, _RANK, metric=metric, solver=Exact()),
            "tnc subspace, residual given": lambda: truncated_svd(residual32, _RANK, metric=metric, solver=Subspace()),
            "tnc exact": lambda: compensate(weight, base, _RANK, stats=stats, solver=Exact()),
            "tnc subspace": lambda: compensate(weight, base, _RANK, stats=stats, solver=Subspace()),
        },
        errors=lambda term: {"above optimum": metric.norm(residual - dense64(term)) / optimum - 1},
        limit={"above optimum": 0.005},
        repeats=repeats,
        once=frozenset({"textbook float64", "tnc exact", "tnc exact, residual given"}) if size >= 4096 else frozenset(),
    )


@case("compensate-1024", "rank-64 compensation of a 1024×1024 int3 residual in H")
def compensate_1024() -> Problem:
    """Small."""
    return _build(1024, repeats=5)


@case("compensate-2048", "rank-64 compensation of a 2048×2048 int3 residual in H")
def compensate_2048() -> Problem:
    """Middle."""
    return _build(2048, repeats=3)


@case("compensate-4096", "rank-64 compensation of a 4096×4096 int3 residual in H")
def compensate_4096() -> Problem:
    """Real size; the slow ways run once."""
    return _build(4096, repeats=5)
