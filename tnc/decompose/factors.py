"""Low-rank factors in a number format: both rounded with feedback, each in the metric it is seen in.

``right`` (k, n) is a weight whose inputs have the moment H; ``left`` (m, k) is one whose inputs ``z = right x``
have ``Z = right H rightᵀ``. So one quantizer serves both, with a refit of the other factor in between (LPLR,
arXiv:2310.11028, here in ``G ⊗ H``; docs/low-rank.md derives it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.decompose.factor_basis import spread
from tnc.decompose.factor_formats import FactorFormats
from tnc.metric import Metric
from tnc.quant import quantizer
from tnc.stats import LayerStats, Moments
from tnc.terms import Expression, LowRank, Product, dense64

# Eigenvalues of an equilibrated Gram matrix below this are the noise of the float32 products behind H.
_NOISE = 1e-7


@dataclass(frozen=True, eq=False)
class QuantizedFactors:
    """Both factors as stored, the largest damping used, and every fallback taken."""

    term: Expression
    damping: float | None
    fallbacks: tuple[str, ...]


def quantize_factors(
    residual: Tensor, factors: LowRank, metric: Metric, formats: FactorFormats, *, method: str = "gptq",
    rounds: int = 2, seed: int = 0,
) -> QuantizedFactors:  # fmt: skip
    """Round the factors of a low-rank approximation of ``residual`` to number formats.

    A round quantizes ``right`` in H, refits ``left = D H rightᵀ (right H rightᵀ)⁺`` (G cancels), quantizes it in
    ``Z = right H rightᵀ``, and refits ``right = (leftᵀ G left)⁺ leftᵀ G D`` (H cancels) for the next round. The
    round of least error is kept. Before the first, the components are spread evenly over the rows of ``right``
    (`spread`), which costs nothing at run time.

    Args:
        residual: D (m, n).
        factors: rank at least 1, from `truncated_svd` in the same metric.
        metric: ``G ⊗ H``.
        formats: of ``left`` and ``right``.
        method: a name of `tnc.quant.QUANTIZERS`. It is given the moments of both sides: H and ``leftᵀ G left`` for
            ``right``, Z and G for ``left``; two-sided quantizers use the second ones.
        rounds: at least 1.
        seed: of the rotation in `spread`.

    Returns:
        ``Product((left, right))`` of two `Quantized` terms.

    Raises:
        FormatError: if a group size does not divide the row of its factor.
        RecipeError: for an unknown method.

    Cost: ``2 m n² + m² n`` flops and two factorizations of H a round, float64.
    Source: LPLR (arXiv:2310.11028, algorithm 1), CALDERA (arXiv:2405.18886, algorithm 2); the spreading is ours.
    """
    found = quantize_shared_factors(
        [residual], [factors.left], factors.right, [metric], formats, method=method, rounds=rounds, seed=seed
    )
    return QuantizedFactors(Product((found.lefts[0], found.right)), found.damping, found.fallbacks)


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """A left factor for every layer and the one right factor, as stored; see `QuantizedFactors`."""

    lefts: tuple[Expression, ...]
    right: Expression
    damping: float | None
    fallbacks: tuple[str, ...]


def quantize_shared_factors(
    residuals: Sequence[Tensor | FactorTarget], lefts: Sequence[Tensor], right: Tensor, metrics: Sequence[Metric],
    formats: FactorFormats, *, method: str = "gptq", rounds: int = 2, seed: int = 0,
) -> SharedFactors:  # fmt: skip
    """`quantize_factors` for layers with the same inputs, a left factor each and one right factor.

    Args:
        residuals: (m_i, n) each, or what was made of them for several roundings.
        lefts: (m_i, k) each.
        right: (k, n).
        metrics: with one H; a G each, or none.
        formats: of ``left`` and ``right``.
        method: as in `quantize_factors`; ``right`` is given H and the sum of ``leftᵀ G left``.
        rounds: at least 1.
        seed: of the rotation in `spread`.
    """
    targets = [
        d if isinstance(d, FactorTarget) else FactorTarget(d, m) for d, m in zip(residuals, metrics, strict=True)
    ]
    known, right = spread([left.double() for left in lefts], right.double(), metrics, seed=seed)
    best: tuple[float, SharedFactors] | None = None
    for _ in range(rounds):
        rounded = _round(targets, known, right, formats, method)
        known = [dense64(left) for left in rounded.lefts]
        stored = dense64(rounded.right)
        error = sum(target.squared_error(left, stored) for target, left in zip(targets, known, strict=True))
        if best is None or error < best[0]:
            best = error, rounded
        right = refit_right([target.residual for target in targets], known, metrics)
    assert best is not None, "rounds is at least 1"
    return best[1]


def _round(
    targets: Sequence[FactorTarget], lefts: Sequence[Tensor], right: Tensor, formats: FactorFormats, method: str
) -> SharedFactors:
    """Quantize ``right``, refit every left factor, quantize it."""
    run, metric = quantizer(method).run, targets[0].metric
    outer = sum(left.T @ target.metric.times_gradient(left) for target, left in zip(targets, lefts, strict=True))
    assert isinstance(outer, Tensor), "there is at least one layer"
    inputs = _side(metric.hessian, right)
    first = run(right, LayerStats(inputs, gradient=_moments(outer)), formats.right)
    known = dense64(first.term)
    gram = metric.times_hessian(known) @ known.T  # Z = right H rightᵀ
    inverse = pseudoinverse(gram)
    found = [
        run(target.seen @ known.T @ inverse, LayerStats(_moments(gram), gradient=target.outputs), formats.left)
        for target in targets
    ]
    named = [*(("left", each) for each in found), ("right", first)]
    return SharedFactors(
        tuple(each.term for each in found), first.term,
        max((each.damping for _, each in named if each.damping is not None), default=None),
        tuple(f"{name} factor: {note}" for name, each in named for note in each.fallbacks),
    )  # fmt: skip


def refit_right(residuals: Sequence[Tensor], lefts: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
    """``(Σ leftᵀ G left)⁺ Σ leftᵀ G D``: the best right factor (k, n) for left factors (m_i, k), whatever H."""
    weighted = [metric.times_gradient(left) for left, metric in zip(lefts, metrics, strict=True)]
    gram = torch.stack([left.T @ w for left, w in zip(lefts, weighted, strict=True)]).sum(0)
    seen = torch.stack([w.T @ residual for w, residual in zip(weighted, residuals, strict=True)]).sum(0)
    return pseudoinverse(gram) @ seen


class FactorTarget:
    """A residual D (m, n) with the products that every round needs: ``2 m n² + 2 m² n`` flops once, float64."""

    def __init__(self, residual: Tensor, metric: Metric) -> None:
        residual = residual.double()
        self.residual, self.metric = residual, metric
        self.seen = metric.times_hessian(residual)  # D H
        self.squared_norm = metric.squared_norm(residual)
        self.outputs = _side(metric.gradient, residual.T)

    def squared_error(self, left: Tensor, right: Tensor) -> float:
        """``‖D - left right‖²`` from k x k matrices."""
        weighted = self.metric.times_gradient(left)
        cross = ((weighted.T @ self.seen) * right).sum()
        square = ((left.T @ weighted) * (self.metric.times_hessian(right) @ right.T)).sum()
        return self.squared_norm - 2 * float(cross) + float(square)


def _side(side: Tensor | None, rows: Tensor) -> Moments:
    """A side of the metric of matrices like ``rows`` (k, n)."""
    if side is None:
        return _moments(torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device))
    return _moments(torch.diag(side) if side.ndim == 1 else side)


def _moments(second: Tensor) -> Moments:
    return Moments((second + second.T) / 2, None, 1)


def pseudoinverse(gram: Tensor) -> Tensor:
    """Pseudoinverse of a PSD matrix, its diagonal first scaled to 1: no component is lost for being small."""
    length = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(length > 0, 1 / length.masked_fill(length == 0, 1), 0.0)
    unit = gram * inverse * inverse.unsqueeze(1)
    found: Tensor = torch.linalg.pinv((unit + unit.T) / 2, hermitian=True, rtol=_NOISE)
    return found * inverse * inverse.unsqueeze(1)
