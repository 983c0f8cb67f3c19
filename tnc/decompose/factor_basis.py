"""The basis of low-rank factors in which rounding them costs least: ``left right = (left A⁻¹)(A right)`` for any A."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnc.metric import Metric


def spread(
    lefts: Sequence[Tensor], right: Tensor, metrics: Sequence[Metric], *, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """The same products ``left @ right`` in the basis in which rounding the rows of ``right`` costs least.

    Rounding row i to a range of its own leaves ``gᵢ² ‖δᵢ‖²``, ``gᵢ`` the G-length of column i of the left factors and
    ``‖δᵢ‖`` in proportion to the row's length ``rᵢ``: ``Σ gᵢ² rᵢ²`` in total. After scaling row i by ``cᵢ`` and a
    rotation that mixes all components alike, it is ``Σ gᵢ² / cᵢ² · Σ cᵢ² rᵢ² / k``, least at ``cᵢ² = gᵢ / rᵢ``, where
    it is ``(Σ gᵢ rᵢ)² / k``: by Cauchy and Schwarz never more, and less the faster the spectrum falls. An eigensolver
    returns a component with either sign; the largest entry of each row of ``right`` is made positive, so that the
    rounded factors do not follow it: what was planned is what is made.

    Args:
        lefts: (m_i, k) each.
        right: (k, n).
        metrics: their G are those of the lengths of the left factors.
        seed: of the random rotation.
    """
    squares = [(a * metric.times_gradient(a)).sum(0).clamp_min(0) for a, metric in zip(lefts, metrics, strict=True)]
    weight = torch.stack(squares).sum(0).sqrt()
    length: Tensor = torch.linalg.vector_norm(right, dim=1)
    # a component that G or the row does not show keeps out of the way of the others
    scale = (_floored(weight) / _floored(length)).sqrt()
    largest = right.gather(1, right.abs().argmax(1, keepdim=True)).squeeze(1)
    scale = torch.where(largest < 0, -scale, scale)
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(scale), len(scale), generator=generator, dtype=torch.float64).to(right.device)
    rotation: Tensor = torch.linalg.qr(square).Q
    return [(left / scale) @ rotation.T for left in lefts], rotation @ (right * scale.unsqueeze(1))


def _floored(lengths: Tensor) -> Tensor:
    """Lengths of at least 1e-12 of the largest; 1 where all are 0."""
    largest = float(lengths.max())
    return lengths.clamp_min(1e-12 * largest) if largest > 0 else torch.ones_like(lengths)
