"""Rows of an expression without its matrix: what an embedding looks up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from tnc.errors import BackendError
from tnc.formats import TrellisFormat
from tnc.terms.base import Expression, wide
from tnc.terms.chain import Chain
from tnc.terms.combine import Product, Sum
from tnc.terms.dense import Dense
from tnc.terms.low_rank import LowRank
from tnc.terms.mpo import Mpo
from tnc.terms.quantized import Quantized


def gather_rows(expression: Expression, index: Tensor) -> Tensor:
    """Rows ``index`` of the matrix, at least float32: (n,) integers to (n, in_features).

    Only what the rows need is read: rows of dense and quantized matrices and of left factors; one slice of every
    core of a matrix product operator. Behind the first factor of a product the others are rebuilt, which is small
    where the first one has many rows and few columns.

    Raises:
        BackendError: for a kind whose rows cannot be gathered (`check_rows`).
    """
    check_rows(expression)
    return _rows(expression, index)


def check_rows(expression: Expression) -> None:
    """Raise `BackendError` unless the rows of an expression can be gathered."""
    if isinstance(expression, Sum):
        for term in expression.terms:
            check_rows(term)
    elif isinstance(expression, Product):
        check_rows(expression.terms[0])
    elif expression.kind not in _RULES:
        raise BackendError(
            f"rows of a {expression.kind} term cannot be gathered without its matrix; expected {', '.join(_RULES)}, or "
            "sums and products that begin with them."
        )
    elif isinstance(expression, Quantized) and not _rows_alone(expression):
        raise BackendError(
            f"rows of {expression.format.describe()} depend on other rows (shared scales, or a trellis down the "
            "column); expected a format of separate rows, such as int4."
        )


def _rows_alone(term: Quantized) -> bool:
    """Whether the codes and scales of a row are all that it needs."""
    shared = term.outer is not None or term.layout.blocks[0] != term.shape[0]
    return not shared and not isinstance(term.format, TrellisFormat)


def _rows(expression: Expression, index: Tensor) -> Tensor:
    if isinstance(expression, Sum):
        return reduce(torch.add, [_rows(term, index) for term in expression.terms])
    if isinstance(expression, Product):
        taken = _rows(expression.terms[0], index)
        for term in expression.terms[1:]:
            matrix = term.to_dense()
            dtype = torch.promote_types(taken.dtype, matrix.dtype)
            taken = taken.to(dtype) @ matrix.to(dtype)
        return taken
    return _RULES[expression.kind](expression, index)


def _dense(term: Expression, index: Tensor) -> Tensor:
    assert isinstance(term, Dense)
    return term.matrix[index].to(wide(term.matrix))


def _low_rank(term: Expression, index: Tensor) -> Tensor:
    assert isinstance(term, LowRank)
    dtype = wide(term.left, term.right)
    return term.left[index].to(dtype) @ term.right.to(dtype)


def _quantized(term: Expression, index: Tensor) -> Tensor:
    assert isinstance(term, Quantized)
    zero = None if term.zero is None else term.zero[index]
    return replace(term, codes=term.codes[index], scale=term.scale[index], zero=zero).to_dense()


def _mpo(term: Expression, index: Tensor) -> Tensor:
    """One digit of the row a core: the chain of ``core[:, digit]`` from the left."""
    assert isinstance(term, Mpo)
    dtype, rest = wide(*term.cores), prod(term.out_modes)
    state = torch.ones(len(index), 1, 1, dtype=dtype, device=index.device)  # (n, columns so far, bond)
    for core in term.cores:
        rest //= core.shape[1]
        digit = index // rest % core.shape[1]
        chosen = core.to(dtype).permute(1, 0, 2, 3)[digit]  # (n, r, i, r')
        state = torch.einsum("ncr,nris->ncis", state, chosen).flatten(1, 2)
    return state.flatten(1)[:, : term.shape[1]]


def _chain(term: Expression, index: Tensor) -> Tensor:
    """Cores are small: they are rebuilt, and one slice of each is taken."""
    assert isinstance(term, Chain)
    return _mpo(term.mpo(), index)


_RULES: dict[str, Callable[[Expression, Tensor], Tensor]] = {
    "dense": _dense, "low_rank": _low_rank, "quantized": _quantized, "mpo": _mpo, "chain": _chain,
}  # fmt: skip
