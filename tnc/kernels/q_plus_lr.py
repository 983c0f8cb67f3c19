"""The shape of operator that weight-only kernels run: a quantized term, alone or plus one low-rank term."""

from __future__ import annotations

from dataclasses import dataclass

from tnc.terms import Expression, LowRank, Product, Quantized, Sum


@dataclass(frozen=True)
class QPlusLR:
    """The two terms, and the prefixes of their tensors in the whole; without a low-rank term both are ``None``."""

    quantized: Quantized
    base: str
    low_rank: LowRank | Product | None = None
    factors: str | None = None


def q_plus_lr(operator: Expression) -> QPlusLR | None:
    """The parts of such an operator, whose factors may be quantized themselves; ``None`` for others."""
    if isinstance(operator, Quantized):
        return QPlusLR(operator, "")
    if not isinstance(operator, Sum) or len(operator.terms) != 2:
        return None
    for base, factors in ((0, 1), (1, 0)):
        quantized, low_rank = operator.terms[base], operator.terms[factors]
        if isinstance(quantized, Quantized) and isinstance(low_rank, LowRank | Product) and _has_factors(low_rank):
            return QPlusLR(quantized, f"{base}.", low_rank, f"{factors}.")
    return None


def _has_factors(term: LowRank | Product) -> bool:
    if isinstance(term, LowRank):
        return True
    return len(term.terms) == 2 and all(isinstance(factor, Quantized) for factor in term.terms)
