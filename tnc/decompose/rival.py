"""The rival of every tensor network: a truncated SVD that stores the same bits.

On weights without structure across modes an SVD is far better, so no network is reported without it.
"""

from __future__ import annotations

from torch import Tensor

from tnc.decompose.low_rank import truncated_svd
from tnc.decompose.peel import leaves
from tnc.metric import Metric
from tnc.stats import LayerStats
from tnc.terms import Expression, LowRank

NETWORKS = ("mpo", "chain")
"""Kinds of terms that are reported beside a truncated SVD."""


def rival(weight: Tensor, operator: Expression, stats: LayerStats | None) -> LowRank | None:
    """The truncated SVD of ``weight`` that stores at most the bits of ``operator``, in the dtype of its networks.

    It is optimal in ``G ⊗ H`` (H without gradients, Frobenius without statistics), and of rank 0 where the bits do not
    pay for one. ``None`` if no term of the operator is a tensor network, or a term is neither that nor low rank: then
    bits of other forms would be compared with bits of low rank. Wrapping transforms count by their bits; the dtype of
    a network of quantized cores is that of their scales.

    Cost: that of `truncated_svd`.
    """
    terms = leaves(operator)
    found = [term for term in terms if term.kind in NETWORKS]
    if not found or any(term.kind not in (*NETWORKS, "low_rank") for term in terms):
        return None
    dtype = next((t.dtype for t in found[0].tensors().values() if t.is_floating_point()), weight.dtype)
    rank = operator.storage_bits // (sum(weight.shape) * dtype.itemsize * 8)
    metric = Metric() if stats is None else Metric.auto(stats)
    return truncated_svd(weight, min(rank, *weight.shape), metric=metric, dtype=dtype)
