"""Random expressions: every registered kind of term, alone and nested in sums and products.

A new kind of leaf joins with one builder in the table below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from hypothesis import strategies as st

from tnc.errors import RecipeError
from tnc.formats import FloatScale, NumberFormat, TableFormat
from tnc.networks import balanced_modes
from tnc.terms import (
    Blast,
    BlockLowRank,
    Chain,
    Cp,
    Dense,
    Diagonal,
    Expression,
    Hadamard,
    LowRank,
    Monarch,
    Mpo,
    Permutation,
    Product,
    Quantized,
    Selection,
    Sparse,
    Sum,
    TensorRing,
    Tucker,
)
from tnc.testing.strategies import SEEDS, formats, shapes

Leaf = Callable[[st.DrawFn, tuple[int, int]], Expression]

_SIZES = (1, 2, 3, 5, 8, 13)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def expressions(
    shape: tuple[int, int] | None = None, *, kinds: Sequence[str] | None = None, depth: int = 2
) -> st.SearchStrategy[Expression]:
    """Expressions of at most 13 x 13 with ``depth`` levels of `Sum` and `Product` above the leaves.

    Args:
        shape: (out_features, in_features); ``None`` draws one.
        kinds: kinds of leaves, by default all; square kinds appear where they fit.
        depth: 0 gives leaves only.

    Raises:
        RecipeError: for a kind without a builder here, or where none of the kinds has that shape.
    """
    chosen = tuple(_LEAVES) if kinds is None else tuple(kinds)
    for kind in chosen:
        if kind not in _LEAVES:
            known = ", ".join(_LEAVES)
            raise RecipeError(f"no strategy for terms of kind {kind!r}; expected one of {known}.")
    if shape is not None and shape[0] != shape[1] and not set(chosen) - _SQUARE:
        raise RecipeError(f"{', '.join(chosen)} terms are square; got shape {shape}. Add another kind.")
    if shape is None and not set(chosen) - _SQUARE:
        return st.sampled_from(_SIZES).flatmap(lambda size: _expressions((size, size), chosen, depth))
    if shape is None:
        return shapes(_SIZES).flatmap(lambda drawn: _expressions(drawn, chosen, depth))
    return _expressions(shape, chosen, depth)


@st.composite
def _expressions(draw: st.DrawFn, shape: tuple[int, int], kinds: tuple[str, ...], depth: int) -> Expression:
    form = draw(st.sampled_from(("leaf", "sum", "product"))) if depth else "leaf"
    if form == "sum":
        count = draw(st.integers(1, 3))
        return Sum(tuple(draw(_expressions(shape, kinds, depth - 1)) for _ in range(count)))
    if form == "product":
        inner = draw(st.lists(st.sampled_from(_inner_sizes(shape, kinds)), max_size=2))
        pairs = zip((shape[0], *inner), (*inner, shape[1]), strict=True)
        return Product(tuple(draw(_expressions(pair, kinds, depth - 1)) for pair in pairs))
    fitting = [k for k in kinds if k not in _SQUARE or shape[0] == shape[1]]
    return _LEAVES[draw(st.sampled_from(fitting))](draw, shape)


def _inner_sizes(shape: tuple[int, int], kinds: tuple[str, ...]) -> tuple[int, ...]:
    return _SIZES if set(kinds) - _SQUARE else (shape[0],)


def _dense(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    return Dense(_gaussian(draw, shape))


def _diagonal(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    return Diagonal(_gaussian(draw, shape[:1]))


def _low_rank(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    rank = draw(st.integers(0, min(shape)))
    return LowRank(_gaussian(draw, (shape[0], rank)), _gaussian(draw, (rank, shape[1])))


def _mpo(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    d = draw(st.integers(1, 3))
    ranks = [1, *(draw(st.integers(0, 3)) for _ in range(d - 1)), 1]
    modes = zip(balanced_modes(shape[0], d), balanced_modes(shape[1], d)[::-1], strict=True)
    return Mpo(tuple(_gaussian(draw, (ranks[k], o, i, ranks[k + 1])) for k, (o, i) in enumerate(modes)), shape)


def _chain(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    d = draw(st.integers(1, 3))
    ranks = [1, *(draw(st.integers(1, 3)) for _ in range(d - 1)), 1]
    outs, ins = balanced_modes(shape[0], d), balanced_modes(shape[1], d)[::-1]
    terms = []
    for legs in zip(ranks, outs, ins, ranks[1:], strict=False):
        cut = draw(st.integers(0, 3))
        leaf = draw(st.sampled_from((_dense, _quantized)))
        terms.append(leaf(draw, (math.prod(legs[:cut]), math.prod(legs[cut:]))))
    return Chain(tuple(terms), tuple(ranks), outs, ins, shape)


def _quantized(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    format = draw(formats(shape[1]))
    blocks = format.layout(shape).blocks
    generator = torch.Generator().manual_seed(draw(SEEDS))
    codes = random_codes(format, shape, generator)
    zero = torch.randint(format.levels, blocks, generator=generator) if format.has_zero else None
    scale = torch.rand(blocks, generator=generator) + 0.01
    if isinstance(format.scales, FloatScale):
        return Quantized.from_codes(codes, scale.to(draw(st.sampled_from(_DTYPES))), zero, format)
    outer = format.scales.outer(scale)
    spread = None if outer is None else format.scales.spread(outer, blocks)
    return Quantized.from_codes(codes, format.scales.store(scale, spread, torch.uint8), zero, format, outer)


def random_codes(format: NumberFormat, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Codes that stand for numbers: (out_features, in_features), int64."""
    codes = torch.randint(format.levels, shape, generator=generator)
    if isinstance(format, TableFormat):
        valid = torch.tensor([code for code, value in enumerate(format.values) if math.isfinite(value)])
        return valid[codes % len(valid)]
    return codes


def _sparse(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.5, 0.0, 0.1, 1.0)))
    return Sparse.of(_gaussian(draw, shape) * kept)


def _hadamard(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    rotation = Hadamard.random(shape[0], seed=draw(SEEDS))
    return rotation.inverse() if draw(st.booleans()) else rotation


def _permutation(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return Permutation.of(torch.randperm(shape[0], generator=generator))


def _selection(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return Selection.of(torch.randint(shape[1], shape[:1], generator=generator), shape[1])


def _blocks(draw: st.DrawFn, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Numbers of blocks and sizes of a block, (out, in)."""
    counts = tuple(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in shape)
    return (counts[0], counts[1]), (shape[0] // counts[0], shape[1] // counts[1])


def _block_low_rank(draw: st.DrawFn, shape: tuple[int, int], cls: type[BlockLowRank] = BlockLowRank) -> Expression:
    (p, q), (rows, columns) = _blocks(draw, shape)
    rank = draw(st.integers(0, min(rows, columns)))
    return cls(_gaussian(draw, (p, rows, q, rank)), _gaussian(draw, (q, p, rank, columns)))


def _blast(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    (p, q), (rows, columns) = _blocks(draw, shape)
    rank = draw(st.integers(0, min(shape)))
    sizes = ((p, rows, rank), (p, q, rank), (q, rank, columns))
    return Blast(*(_gaussian(draw, size) for size in sizes))


def _legs(draw: st.DrawFn, size: int, count: int) -> tuple[int, ...]:
    """A factorization of ``size`` into ``count`` modes, in any order."""
    first = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) if count > 1 else size
    return (first, *_legs(draw, size // first, count - 1)) if count > 1 else (first,)


def _tensor_ring(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    d = draw(st.integers(1, 3))
    outs, ins = _legs(draw, shape[0], d), _legs(draw, shape[1], d)
    ranks = [draw(st.integers(0, 3)) for _ in range(d)]
    sizes = zip(ranks, outs, ins, [*ranks[1:], ranks[0]], strict=True)
    return TensorRing(tuple(_gaussian(draw, size) for size in sizes))


def _tucker(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    d = draw(st.integers(1, 2))
    modes = (*_legs(draw, shape[0], d), *_legs(draw, shape[1], d))
    ranks = tuple(draw(st.integers(0, 3)) for _ in modes)
    factors = tuple(_gaussian(draw, pair) for pair in zip(modes, ranks, strict=True))
    return Tucker(_gaussian(draw, ranks), factors)


def _cp(draw: st.DrawFn, shape: tuple[int, int]) -> Expression:
    d, rank = draw(st.integers(1, 2)), draw(st.integers(0, 4))
    modes = (*_legs(draw, shape[0], d), *_legs(draw, shape[1], d))
    return Cp(tuple(_gaussian(draw, (mode, rank)) for mode in modes))


def _gaussian(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return torch.randn(shape, generator=generator).to(draw(st.sampled_from(_DTYPES)))


_LEAVES: dict[str, Leaf] = {
    "dense": _dense,
    "low_rank": _low_rank,
    "mpo": _mpo,
    "chain": _chain,
    "quantized": _quantized,
    "diagonal": _diagonal,
    "sparse": _sparse,
    "hadamard": _hadamard,
    "permutation": _permutation,
    "selection": _selection,
    "block_low_rank": _block_low_rank,
    "monarch": partial(_block_low_rank, cls=Monarch),
    "blast": _blast,
    "tensor_ring": _tensor_ring,
    "tucker": _tucker,
    "cp": _cp,
}
_SQUARE = {"diagonal", "hadamard", "permutation"}
