"""Weights with a prescribed spectrum and second moments of a prescribed kind, each rebuilt from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnc.errors import RecipeError

SPECTRA = (
    "flat", "power", "exponential", "low_rank", "low_rank_noise", "outlier_columns", "outlier_rows",
    "constant", "zero",
)  # fmt: skip
"""Kinds of weights, the simplest first."""

HESSIANS = ("identity", "diagonal", "full", "deficient", "ill_conditioned", "dead_column", "zero")
"""Kinds of second moments, the simplest first."""

_OUTLIER = 50.0
_NOISE = 1e-2


def make_weight(
    shape: tuple[int, int],
    *,
    spectrum: str = "flat",
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """A weight (out_features, in_features) whose largest absolute entry is ``scale``.

    Args:
        shape: (m, n).
        spectrum: singular values 1 (``flat``), ``1/i`` (``power``), ``2**-i`` (``exponential``), a third of
            them 1 and the rest 0 (``low_rank``), the same plus Gaussian noise of 1 %
            (``low_rank_noise``); Gaussian with one column or row 50 times the others (``outlier_columns``,
            ``outlier_rows``); all entries equal (``constant``); ``zero``.
        scale: largest absolute entry, before the rounding to ``dtype``.
        dtype: of the result; built in float64.
        seed: of the random orthogonal factors or entries.

    Raises:
        RecipeError: for an unknown spectrum; lists the known ones.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = _matrix(shape, spectrum, generator)
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    return (matrix * (scale / largest if largest > 0 else 1.0)).to(dtype)


def make_hessian(size: int, *, kind: str = "full", scale: float = 1.0, seed: int = 0) -> Tensor:
    """A second moment ``mean of x xᵀ`` (size, size), float64, symmetric positive semidefinite.

    Args:
        size: n.
        kind: ``identity``; ``diagonal`` over four decades; ``full`` (2 n + 2 correlated tokens);
            ``deficient`` (n / 2 tokens, so rank below n); ``ill_conditioned`` (condition number 1e8);
            ``dead_column`` (``full`` with one input always 0); ``zero``.
        scale: factor on the inputs x, so the moment grows with its square.
        seed: of the random inputs.

    Raises:
        RecipeError: for an unknown kind; lists the known ones.
    """
    return second_moment(make_inputs(size, kind=kind, scale=scale, seed=seed))


def make_inputs(size: int, *, kind: str, scale: float = 1.0, seed: int = 0) -> Tensor:
    """The inputs (tokens, size), float64, behind `make_hessian` of the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return scale * _inputs(size, kind, generator)


def second_moment(inputs: Tensor) -> Tensor:
    """Mean of ``x xᵀ`` over the rows of ``inputs`` (tokens, n), exactly symmetric."""
    moment = inputs.T @ inputs / inputs.shape[0]
    return (moment + moment.T) / 2


def _matrix(shape: tuple[int, int], spectrum: str, generator: torch.Generator) -> Tensor:
    count = min(shape)
    step = torch.arange(count, dtype=torch.float64)
    head = (step < math.ceil(count / 3)).double()
    if spectrum in ("outlier_columns", "outlier_rows"):
        return _outliers(_gaussian(shape, generator), int(spectrum == "outlier_columns"), generator)
    if spectrum == "constant":
        return torch.ones(shape, dtype=torch.float64)
    if spectrum == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    decays = {"flat": 0 * step + 1, "power": 1 / (step + 1), "exponential": 0.5**step, "low_rank": head}
    if spectrum in decays:
        return _with_singular_values(shape, decays[spectrum], generator)
    if spectrum == "low_rank_noise":
        return _with_singular_values(shape, head, generator) + _NOISE * _gaussian(shape, generator)
    raise RecipeError(f"unknown spectrum {spectrum!r}; expected one of {', '.join(SPECTRA)}.")


def _inputs(size: int, kind: str, generator: torch.Generator) -> Tensor:
    root = math.sqrt(size)  # size tokens with X = root * Sᵀ have the second moment S Sᵀ
    if kind == "identity":
        return root * torch.eye(size, dtype=torch.float64)
    if kind == "diagonal":
        decades = torch.rand(size, generator=generator, dtype=torch.float64)
        return root * torch.diag(10 ** (2 * decades - 1))
    if kind == "zero":
        return torch.zeros(1, size, dtype=torch.float64)
    if kind == "ill_conditioned":
        decay = torch.logspace(0, -4, size, dtype=torch.float64)
        return root * decay.unsqueeze(1) * _orthonormal(size, size, generator).T
    if kind not in ("full", "deficient", "dead_column"):
        raise RecipeError(f"unknown kind of second moment {kind!r}; expected one of {', '.join(HESSIANS)}.")
    tokens = max(1, size // 2) if kind == "deficient" else 2 * size + 2
    mix = torch.eye(size, dtype=torch.float64) + _gaussian((size, size), generator) / root
    inputs = _gaussian((tokens, size), generator) @ mix
    if kind == "dead_column":
        inputs[:, int(torch.randint(size, (), generator=generator))] = 0
    return inputs


def _with_singular_values(shape: tuple[int, int], values: Tensor, generator: torch.Generator) -> Tensor:
    left = _orthonormal(shape[0], len(values), generator)
    right = _orthonormal(shape[1], len(values), generator)
    return left * values @ right.T


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(_gaussian((rows, columns), generator)).Q
    return basis


def _outliers(matrix: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    place = int(torch.randint(matrix.shape[axis], (), generator=generator))
    matrix.select(axis, place).mul_(_OUTLIER)
    return matrix


def _gaussian(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
