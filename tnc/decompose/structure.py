"""What kind of term an expression is, read off its structure."""

from __future__ import annotations

from tnc.terms import Dense, Expression, LowRank, Product, Quantized


def rank_of(term: Expression) -> int | None:
    """Rank of a low-rank term: a `LowRank`, or a product of two stored factors; ``None`` for other terms."""
    if isinstance(term, LowRank):
        return term.rank
    if isinstance(term, Product) and len(term.terms) == 2 and all(isinstance(t, Dense | Quantized) for t in term.terms):
        return term.terms[0].shape[1]
    return None
