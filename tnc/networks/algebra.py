"""Sums, products and transposes of matrix product operators: bond dimensions add in sums and multiply in products."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from tnc.errors import ShapeError, check_same_shape
from tnc.networks.modes import Modes
from tnc.terms import Mpo
from tnc.terms.base import wide


def add(a: Mpo, b: Mpo) -> Mpo:
    """``A + B`` with bond dimensions ``r_a + r_b``, in the wider dtype of the two.

    Raises:
        ShapeError: if the operators differ in shape or modes.
    """
    check_same_shape(b.shape, a.shape, "b", "a")
    check_same_shape((*b.out_modes, *b.in_modes), (*a.out_modes, *a.in_modes), "modes of b", "a")
    last = len(a.cores) - 1
    pairs = enumerate(zip(a.cores, b.cores, strict=True))
    return replace(a, cores=tuple(_beside(x, y, first=k == 0, last=k == last) for k, (x, y) in pairs))


def scale(mpo: Mpo, factor: float) -> Mpo:
    """``factor * A``; the first core takes the factor."""
    return replace(mpo, cores=(mpo.cores[0] * factor, *mpo.cores[1:]))


def transpose(mpo: Mpo) -> Mpo:
    """``Aᵀ``: output and input modes change places."""
    cores = tuple(core.transpose(1, 2).contiguous() for core in mpo.cores)
    return Mpo(cores, None if mpo.features is None else (mpo.features[1], mpo.features[0]))


def compose(a: Mpo, b: Mpo) -> Mpo:
    """``A @ B`` with bond dimensions ``r_a r_b``, twice that where the modes between them are padded.

    Args:
        a: (m, k).
        b: (k, n), its output modes equal to the input modes of ``a``.

    Raises:
        ShapeError: if the inner features or modes differ.
    """
    if a.shape[1] != b.shape[0] or a.in_modes != b.out_modes:
        raise ShapeError(
            f"compose got A of shape {a.shape} with in_modes {a.in_modes} and B of shape {b.shape} with out_modes "
            f"{b.out_modes}; expected the same features and modes between them. Decompose both over the same modes."
        )
    if prod(a.in_modes) != a.shape[1]:
        a = _joined(a, projector(a.in_modes, a.shape[1], a.cores[0]))
    return _joined(a, b)


def without_padding(mpo: Mpo) -> Mpo:
    """The same operator with zeros in the padded rows and columns; bond dimensions double for each padded side."""
    rows, columns = mpo.shape
    if prod(mpo.out_modes) != rows:
        mpo = replace(_joined(projector(mpo.out_modes, rows, mpo.cores[0]), mpo), features=mpo.features)
    if prod(mpo.in_modes) != columns:
        mpo = replace(_joined(mpo, projector(mpo.in_modes, columns, mpo.cores[0])), features=mpo.features)
    return mpo


def projector(modes: Modes, features: int, like: Tensor) -> Mpo:
    """Diagonal operator that keeps the first ``features`` of ``prod(modes)`` indices: bond dimension 2.

    It compares an index with the last one kept, digit by digit: bond state 0 is "equal so far", 1 "already less".
    """
    digits, rest = [], features - 1
    for mode in reversed(modes):
        digits.append(rest % mode)
        rest //= mode
    cores = []
    for k, (mode, digit) in enumerate(zip(modes, reversed(digits), strict=True)):
        core = like.new_zeros(2, mode, mode, 2)
        index = torch.arange(mode, device=like.device)
        core[0, digit, digit, 0] = 1
        core[0, index[:digit], index[:digit], 1] = 1
        core[1, index, index, 1] = 1
        core = core[:1] if k == 0 else core
        cores.append(core.sum(3, keepdim=True) if k == len(modes) - 1 else core)
    return Mpo(tuple(cores))


def _joined(a: Mpo, b: Mpo) -> Mpo:
    """Product over the padded modes."""
    dtype = wide(*a.cores, *b.cores) if a.cores[0].dtype != b.cores[0].dtype else a.cores[0].dtype
    pairs = zip(a.cores, b.cores, strict=True)
    cores = tuple(torch.einsum("aoxb,cxid->acoibd", x.to(dtype), y.to(dtype)) for x, y in pairs)
    joined = tuple(core.flatten(4).flatten(0, 1) for core in cores)
    return Mpo(joined, (a.shape[0], b.shape[1]))


def _beside(a: Tensor, b: Tensor, *, first: bool, last: bool) -> Tensor:
    """The cores as blocks: a row at the first site, a column at the last, a diagonal between."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if first and last:
        return a + b
    if first:
        return torch.cat([a, b], dim=3)
    if last:
        return torch.cat([a, b], dim=0)
    zero_a = a.new_zeros(a.shape[0], *a.shape[1:3], b.shape[3])
    zero_b = b.new_zeros(b.shape[0], *b.shape[1:3], a.shape[3])
    return torch.cat([torch.cat([a, zero_a], dim=3), torch.cat([zero_b, b], dim=3)], dim=0)
