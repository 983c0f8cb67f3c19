"""The shape of operator that weight-only kernels run: a quantized term, alone or plus one low-rank term."""

from __future__ import annotations

from dataclasses import dataclass

from tnc.terms import Expression, LowRank, Quantized, Sum


@dataclass(frozen=True)
class QPlusLR:
    """The quantized term, and the prefixes of both terms' tensors in the whole; no low-rank term is ``None``."""

    quantized: Quantized
    base: str
    factors: str | None


def q_plus_lr(operator: Expression) -> QPlusLR | None:
    """The parts of such an operator; ``None`` for others."""
    if isinstance(operator, Quantized):
        return QPlusLR(operator, "", None)
    if not isinstance(operator, Sum) or len(operator.terms) != 2:
        return None
    for base, factors in ((0, 1), (1, 0)):
        quantized, low_rank = operator.terms[base], operator.terms[factors]
        if isinstance(quantized, Quantized) and isinstance(low_rank, LowRank):
            return QPlusLR(quantized, f"{base}.", f"{factors}.")
    return None
