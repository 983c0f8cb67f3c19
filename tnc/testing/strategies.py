"""Hypothesis strategies for weights, second moments, whole problems and number formats.

They draw shapes, kinds, scales and a seed, not entries, and list the simplest choice first, so that a
failing case shrinks to something one can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.formats import SUPPORTED_BITS, TABLES, IntFormat, NumberFormat, TableFormat, TrellisFormat
from tnc.testing.matrices import HESSIANS, SPECTRA, make_hessian, make_weight
from tnc.testing.problems import METRICS, WeightedProblem, make_problem

SIZES = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 23, 24)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALES = (1.0, 1e-2, 1e2, 1e-4, 1e4, 1e-6, 1e6)
SEEDS = st.integers(0, 255)

_HALF_SCALES = (1e-2, 1e2)  # of float16, which ends at 65504 and thins out below 6e-5


def shapes(sizes: Sequence[int] = SIZES) -> st.SearchStrategy[tuple[int, int]]:
    """(out_features, in_features), among them 1 x n, m x 1, squares and primes."""
    return st.tuples(st.sampled_from(sizes), st.sampled_from(sizes))


def weights(
    shape: tuple[int, int] | None = None,
    *,
    spectra: Sequence[str] = SPECTRA,
    scales: Sequence[float] = SCALES,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> st.SearchStrategy[Tensor]:
    """Weights (out_features, in_features) of at most 24 x 24.

    Args:
        shape: fixed shape; ``None`` draws one.
        spectra: kinds of weights, as in `make_weight`.
        scales: largest absolute entries; float16 weights take those within 1e-2 to 1e2, or 1.
        dtypes: of the weight.
    """
    return _weights(shape, tuple(spectra), tuple(scales), tuple(dtypes))


@st.composite
def _weights(
    draw: st.DrawFn,
    shape: tuple[int, int] | None,
    spectra: tuple[str, ...],
    scales: tuple[float, ...],
    dtypes: tuple[torch.dtype, ...],
) -> Tensor:
    dtype = draw(st.sampled_from(dtypes))
    return make_weight(
        draw(shapes()) if shape is None else shape,
        spectrum=draw(st.sampled_from(spectra)),
        scale=draw(scales_of(dtype, scales)),
        dtype=dtype,
        seed=draw(SEEDS),
    )


def scales_of(dtype: torch.dtype, scales: Sequence[float]) -> st.SearchStrategy[float]:
    """Those of ``scales`` that ``dtype`` and the products of two such numbers can hold."""
    if dtype == torch.float16:
        scales = [s for s in scales if _HALF_SCALES[0] <= s <= _HALF_SCALES[1]] or [1.0]
    return st.sampled_from(scales)


def hessians(size: int, *, kinds: Sequence[str] = HESSIANS) -> st.SearchStrategy[Tensor]:
    """Second moments (size, size) float64 of the given kinds, as in `make_hessian`."""
    return st.builds(
        lambda kind, scale, seed: make_hessian(size, kind=kind, scale=scale, seed=seed),
        st.sampled_from(kinds), st.sampled_from((1.0, 1e-3, 1e3)), SEEDS,
    )  # fmt: skip


@st.composite
def weighted_problems(
    draw: st.DrawFn,
    shape: tuple[int, int] | None = None,
    *,
    spectra: Sequence[str] = SPECTRA,
    scales: Sequence[float] = SCALES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    hessians: Sequence[str] = HESSIANS,
    metrics: Sequence[str] = METRICS,
) -> WeightedProblem:
    """Problems with or without gradients and held-out tokens.

    Args:
        draw: supplied by Hypothesis.
        shape: fixed shape; ``None`` draws one of at most 24 x 24.
        spectra: kinds of weights, as in `make_weight`.
        scales: largest absolute entries, as in `weights`.
        dtypes: of the weight.
        hessians: kinds of ``H`` and ``G``.
        metrics: as in `make_problem`.
    """
    dtype = draw(st.sampled_from(tuple(dtypes)))
    metric = draw(st.sampled_from(tuple(metrics)))
    kinds = st.sampled_from(tuple(hessians))
    return make_problem(
        draw(shapes()) if shape is None else shape,
        spectrum=draw(st.sampled_from(tuple(spectra))),
        scale=draw(scales_of(dtype, scales)),
        dtype=dtype,
        hessian=draw(kinds),
        input_scale=draw(st.sampled_from((1.0, 1e-3, 1e3))),
        gradient=draw(kinds if metric == "fisher" else st.none() | kinds),
        heldout=draw(st.booleans()),
        metric=metric,
        seed=draw(SEEDS),
    )


def int_formats(
    in_features: int | None = None, *, bits: Sequence[int] = SUPPORTED_BITS
) -> st.SearchStrategy[IntFormat]:
    """Integer formats with 16-bit scales whose group size divides ``in_features``; only per-row ones for ``None``."""
    return st.builds(IntFormat, st.sampled_from(tuple(bits)), _group_sizes(in_features), st.booleans())


def formats(in_features: int | None = None) -> st.SearchStrategy[NumberFormat]:
    """Number formats of every kind that fit ``in_features`` columns; only per-row ones for ``None``.

    Groups divide the columns, or are padded; tables may have one scale for several rows; a trellis has few states.
    """
    if in_features is None:
        return st.one_of(entry_formats(), st.sampled_from([TrellisFormat(2, 4), TrellisFormat(3, 6)]))
    return st.one_of(entry_formats(in_features), entry_formats(in_features), _trellises(in_features))


def entry_formats(in_features: int | None = None) -> st.SearchStrategy[NumberFormat]:
    """The formats of `formats` whose entries are rounded one by one: all but trellises."""
    if in_features is None:
        return st.one_of(int_formats(), st.sampled_from([TableFormat(t) for t in TABLES]))
    return _entry_formats(in_features)


@st.composite
def _trellises(draw: st.DrawFn, in_features: int) -> NumberFormat:
    bits, digits, length = (draw(st.sampled_from(each)) for each in ((2, 3, 4), (2, 1, 3), (256, 1, 9)))
    path = draw(st.sampled_from(("column", "diagonal")))
    return TrellisFormat(bits, bits * digits, length=length, path=path, group_size=draw(_group_sizes(in_features)))


def _group_sizes(in_features: int | None) -> st.SearchStrategy[int | None]:
    return st.sampled_from([None, *(d for d in range(1, (in_features or 0) + 1) if (in_features or 0) % d == 0)])


@st.composite
def _entry_formats(draw: st.DrawFn, in_features: int) -> NumberFormat:
    kind = draw(st.sampled_from(("int", "table", "blocks")))
    scale = draw(st.sampled_from(("half", "uint8", "bfloat16", "float32")))
    pad = draw(st.booleans())
    group = draw(st.sampled_from((2, 3, 5, 16)) if pad else _group_sizes(in_features))
    if kind == "int":
        return replace(draw(int_formats()), group_size=group, scale=scale, pad=pad)
    table = draw(st.sampled_from(tuple(TABLES)))
    if kind == "blocks":
        return TableFormat(table, draw(st.sampled_from((None, 2, 4, 5))), draw(st.sampled_from((None, 2, 3))), scale)
    return TableFormat(table, group, scale=draw(st.sampled_from((scale, "e4m3", "e8m0"))), pad=pad)
