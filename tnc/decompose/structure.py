"""What kind of term an expression is, read off its structure."""

from __future__ import annotations

from tnc.terms import Dense, Expression, LowRank, Product, Quantized, Selection


def rank_of(term: Expression) -> int | None:
    """Rank of a low-rank term: a `LowRank`, or a stored factor times another or a selection; ``None`` for others."""
    if isinstance(term, LowRank):
        return term.rank
    if isinstance(term, Product) and len(term.terms) == 2:
        left, right = term.terms
        if isinstance(left, Dense | Quantized) and isinstance(right, Dense | Quantized | Selection):
            return left.shape[1]
    return None
