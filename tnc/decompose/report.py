"""What a decomposition cost: errors of the tensors as stored, what theory guarantees, what no one can beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tnc.decompose.certificate import lower_bound
from tnc.decompose.peel import leaves
from tnc.decompose.rival import rival
from tnc.decompose.structure import rank_of
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Chain, Expression, Mpo, Quantized, dense64

# Norms of layers up to this width are taken in float64; wider ones in float32 products with a float64 sum.
_DOUBLE_LIMIT = 2048


@dataclass(frozen=True)
class LayerReport:
    """The certificate of one layer. Errors are relative, not squared, ``norm_H(W - Ŵ) / norm_H(W)``.

    Attributes:
        shape: (out_features, in_features).
        bits_per_weight: all stored bits over ``out * in``.
        storage_bits: all stored bits.
        bits: bits of the quantized base's codes, or ``None``.
        rank: rank of the low-rank term, or ``None``.
        relative_error: in H of the calibration tokens (Frobenius where there were none).
        heldout_relative_error: in H of the held-out tokens, or ``None``.
        predicted_nats: ``½ tr(Eᵀ G E H)`` in nats per token on the held-out tokens' H where there is one,
            else on the calibration tokens'; ``None`` without gradients.
        guaranteed_error: upper bound on ``relative_error`` known before measuring (exact tail of the
            low-rank problem, without storage rounding), or ``None``.
        lower_bound: no term of this form and size, on this base or grid, has a smaller relative error.
        hessian_rank: numerical rank of H, or ``None``.
        tokens: calibration tokens.
        damping: the multiple of ``mean(diag H)`` added inside GPTQ, or ``None``; the low-rank path has none.
        fallbacks: everything that was done otherwise than asked.
        seconds: wall time of the decomposition.
        choices: what searches settled on, such as AWQ's alpha.
        bonds: inner bond dimensions of a matrix product operator, or ``None``.
        svd_relative_error: of a tensor network: what a truncated SVD of the same bits, best in ``G ⊗ H`` where that
            is known, reaches; ``None`` for other forms.
        svd_predicted_nats: the same in predicted nats.
    """

    shape: tuple[int, int]
    bits_per_weight: float
    storage_bits: int
    bits: float | None
    rank: int | None
    relative_error: float
    heldout_relative_error: float | None
    predicted_nats: float | None
    guaranteed_error: float | None
    lower_bound: float
    hessian_rank: int | None
    tokens: int
    damping: float | None
    fallbacks: tuple[str, ...]
    seconds: float
    choices: tuple[str, ...] = ()
    bonds: tuple[int, ...] | None = None
    svd_relative_error: float | None = None
    svd_predicted_nats: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        lists = {
            "shape": list(self.shape), "fallbacks": list(self.fallbacks), "choices": list(self.choices),
            "bonds": None if self.bonds is None else list(self.bonds),
        }  # fmt: skip
        return {**asdict(self), **lists}


def measure(
    weight: Tensor, operator: Expression, stats: LayerStats | None, *, damping: float | None = None,
    fallbacks: tuple[str, ...] = (), guaranteed_error: float | None = None, seconds: float = 0.0,
    choices: tuple[str, ...] = (),
) -> LayerReport:  # fmt: skip
    """Measure an operator, as stored, against the weight it stands for.

    Cost: up to three products ``E H`` and one ``G E``, the certificate's eigenproblem of the smaller side, and for a
    tensor network a truncated SVD of ``weight``.
    """
    dtype = torch.float64 if max(weight.shape) <= _DOUBLE_LIMIT else torch.float32
    reference = weight.double()
    error = (reference - dense64(operator)).to(dtype)
    reference = reference.to(dtype)
    metric = Metric() if stats is None else Metric.full(stats)
    bound, note = lower_bound(weight, operator, metric)
    other = rival(weight, operator, stats)
    rest = None if other is None else (weight.double() - dense64(other)).to(dtype)
    norm, relative_error = metric.norm(reference), metric.relative(error, reference)
    return LayerReport(
        shape=(weight.shape[0], weight.shape[1]),
        bits_per_weight=operator.storage_bits / weight.numel(),
        storage_bits=operator.storage_bits,
        bits=_bits_of(operator),
        rank=_rank_of(operator),
        relative_error=relative_error,
        heldout_relative_error=_heldout_error(error, reference, stats),
        predicted_nats=predicted_nats(error, stats),
        guaranteed_error=guaranteed_error,
        # attained by this very operator: above its error a bound is the rounding of the measurement
        lower_bound=min(bound / norm, relative_error) if norm > 0 else 0.0,
        hessian_rank=None if stats is None else stats.inputs.rank,
        tokens=0 if stats is None else stats.tokens,
        damping=damping,
        fallbacks=fallbacks + (() if stats is None else stats.notes) + ((note,) if note else ()),
        seconds=seconds,
        choices=choices,
        bonds=_bonds_of(operator),
        svd_relative_error=None if rest is None else metric.relative(rest, reference),
        svd_predicted_nats=None if rest is None else predicted_nats(rest, stats),
    )


def price_of(weight: Tensor, operator: Expression, stats: LayerStats | None) -> float:
    """What forms of one layer are compared by: predicted nats, held-out error or error, the first that is known.

    Cost: two products of `measure` at most.
    """
    dtype = torch.float64 if max(weight.shape) <= _DOUBLE_LIMIT else torch.float32
    reference = weight.double()
    error, reference = (reference - dense64(operator)).to(dtype), reference.to(dtype)
    nats = predicted_nats(error, stats)
    if nats is not None:
        return nats
    heldout = _heldout_error(error, reference, stats)
    metric = Metric() if stats is None else Metric.full(stats)
    return metric.relative(error, reference) if heldout is None else heldout


def predicted_nats(error: Tensor, stats: LayerStats | None) -> float | None:
    """``½ tr(Eᵀ G E H)`` in nats per token, H of the held-out tokens where there are any; ``None`` without G."""
    if stats is None or stats.gradient is None:
        return None
    inputs = stats.inputs if stats.heldout is None else stats.heldout
    return Metric(inputs.second, stats.gradient.second).nats(error)


def _heldout_error(error: Tensor, weight: Tensor, stats: LayerStats | None) -> float | None:
    if stats is None or stats.heldout is None:
        return None
    return Metric(stats.heldout.second).relative(error, weight)


def _rank_of(operator: Expression) -> int | None:
    ranks = [rank for t in leaves(operator) if (rank := rank_of(t)) is not None]
    return sum(ranks) if ranks else None


def _bonds_of(operator: Expression) -> tuple[int, ...] | None:
    found = [t.ranks[1:-1] for t in leaves(operator) if isinstance(t, Mpo | Chain)]
    return found[0] if len(found) == 1 else None


def _bits_of(operator: Expression) -> float | None:
    bits = [t.format.code_bits for t in leaves(operator) if isinstance(t, Quantized)]
    return max(bits) if bits else None
