"""What kind of term an expression is, read off its structure."""

from __future__ import annotations

from tnc.terms import Chain, Dense, Expression, LowRank, Product, Quantized, Selection, Sum


def rank_of(term: Expression) -> int | None:
    """Rank of a low-rank term: a `LowRank`, or a stored factor times another or a selection; ``None`` for others."""
    if isinstance(term, LowRank):
        return term.rank
    if isinstance(term, Product) and len(term.terms) == 2:
        left, right = term.terms
        if isinstance(left, Dense | Quantized) and isinstance(right, Dense | Quantized | Selection):
            return left.shape[1]
    return None


def has_codes(term: Expression) -> bool:
    """Whether a quantized matrix is anywhere in an expression: a base, a factor or a core."""
    if isinstance(term, Sum | Product | Chain):
        return any(map(has_codes, term.terms))
    return isinstance(term, Quantized)
