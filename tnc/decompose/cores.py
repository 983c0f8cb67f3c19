"""Cores of a matrix product operator in number formats: rounded one at a time, the others make up for it (Q-MPO).

A core cut into rows is a matrix whose rounding error is weighed by the metric between its environments, nearly a
Kronecker product of a row and a column moment (`tnc.networks.core_moments`): it is rounded like any weight, with
feedback in both. The cores not yet rounded are then refitted to what is left, as the factors of a low-rank term
are (LPLR, arXiv:2310.11028).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tnc.errors import FormatError
from tnc.formats import NumberFormat
from tnc.metric import Metric
from tnc.networks.als import best_core, layer_of, local_problem, shift
from tnc.networks.core_moments import core_moments
from tnc.networks.layer import Layer
from tnc.networks.modes import Modes
from tnc.quant import quantizer, refine
from tnc.stats import LayerStats, Moments
from tnc.terms import Chain, Dense, Expression, Mpo, dense64

_NARROWEST = 128  # columns below which scales weigh
_WIDEST = 1024  # columns of a core, whose moment is factored: the widest rows below it are taken
_UNSEEN = 1e-12  # singular values of a bond below this share of the largest count as that share
_REFINED = 3  # sweeps over codes and scales of a core after it is rounded

CoreFormats = NumberFormat | tuple[NumberFormat | None, ...]
"""One format for all cores, or one for each (``None`` stores floats)."""


@dataclass(frozen=True, eq=False)
class QuantizedCores:
    """The operator as stored, the largest damping used, and every fallback taken."""

    chain: Chain
    damping: float | None
    fallbacks: tuple[str, ...]


def formats_of(formats: CoreFormats, cores: int) -> tuple[NumberFormat | None, ...]:
    """A format for each core.

    Raises:
        FormatError: if a list has another length.
    """
    given = (formats,) * cores if isinstance(formats, NumberFormat) else formats
    if len(given) != cores:
        raise FormatError(f"{len(given)} formats for {cores} cores; expected one format, or one for every core.")
    return given


def core_bits(
    formats: CoreFormats | None, out_modes: Modes, in_modes: Modes, ranks: Sequence[int], dtype: torch.dtype
) -> int:
    """Bits of the cores with these bond dimensions (d + 1): codes, scales and zero points, or floats.

    Raises:
        FormatError: if a group size does not divide the rows of its core.
    """
    each = (None,) * len(out_modes) if formats is None else formats_of(formats, len(out_modes))
    bits = 0
    for format, *legs in zip(each, ranks, out_modes, in_modes, ranks[1:], strict=False):
        cut = row_cut(legs)
        size = (prod(legs[:cut]), prod(legs[cut:]))
        bits += prod(size) * dtype.itemsize * 8 if format is None else format.stored_bits(size)
    return bits


def row_cut(legs: Sequence[int]) -> int:
    """How many legs of a core (r_prev, o, i, r_next) make its rows.

    The fewest that leave at most 1024 columns, which all share what a row stores besides its codes; one fewer where
    that leaves less than 128, up to 8192 columns.
    """
    cut = next((cut for cut in range(3) if prod(legs[cut:]) <= _WIDEST), 3)
    narrow = prod(legs[cut:]) < _NARROWEST and cut > 0
    return cut - 1 if narrow and prod(legs[cut - 1 :]) <= 8 * _WIDEST else cut


def quantize_cores(
    weight: Tensor, mpo: Mpo, metric: Metric, formats: CoreFormats, *, method: str = "yaqa", rounds: int = 2,
    seed: int = 0,
) -> QuantizedCores:  # fmt: skip
    """Round the cores of an operator fitted to ``weight`` to number formats.

    Cores are rounded from the first to the last, each after the cores behind it have been refitted to the ones stored
    before it; its codes and scales are then improved in the same moments (`tnc.quant.refine`). In later rounds each
    core in turn is solved for with all others as stored, and rounded again. The operator of least error is kept.
    Before the first round the weight of each bond is shared evenly by its two cores, and spread over its components by
    a random rotation (as `tnc.decompose.factor_basis.spread`), which costs nothing to run.

    Args:
        weight: (m, n).
        mpo: fitted to it.
        metric: ``G ⊗ H``.
        formats: of the cores, cut into rows by `row_cut`.
        method: a name of `tnc.quant.QUANTIZERS`; it is given both moments of the core.
        rounds: 0 rounds each core once, improves none and refits none.
        seed: of the rotations.

    Returns:
        A `Chain` of `Quantized` (and `Dense`) cores.

    Raises:
        FormatError: for a wrong number of formats, or a group size that does not divide the row of its core.
        RecipeError: for an unknown method.
        ShapeError, NonFiniteError: for an operator of another shape, or a weight that holds NaN or Inf.

    Cost: that of `core_moments` and of one step of `tnc.networks.als` for every core and round.
    """
    layer = layer_of(weight, mpo, None, metric)
    work = _Cores(layer, mpo, formats_of(formats, len(mpo.cores)), method, _REFINED if rounds else 0)
    work.spread(0, seed)
    for k in range(len(work.cores)):
        work.store(k)
        if rounds and k + 1 < len(work.cores):
            work.refit(k + 1)
            work.spread(k + 1, seed)
    best, least = work.chain(), work.error()
    for _ in range(rounds - 1):
        for k in range(len(work.cores)):
            work.solve(k)
            work.store(k)
            if (error := work.error()) < least:
                best, least = work.chain(), error
    return QuantizedCores(best, max(work.damping, default=None), tuple(dict.fromkeys(work.notes)))


class _Cores:
    """Cores in float64, as stored where ``terms[k]`` is, and what rounding them took."""

    def __init__(
        self, layer: Layer, mpo: Mpo, formats: tuple[NumberFormat | None, ...], method: str, sweeps: int
    ) -> None:
        self.layer, self.formats, self.run, self.sweeps = layer, formats, quantizer(method).run, sweeps
        self.features, self.dtype = mpo.features, mpo.cores[0].dtype
        self.cores = [core.double() for core in mpo.cores]
        self.terms: list[Expression | None] = [None] * len(self.cores)
        self.damping: list[float] = []
        self.notes: list[str] = []

    def store(self, k: int) -> None:
        """Round core k."""
        legs = self.cores[k].shape
        self.terms[k] = term = self._rounded(k, row_cut(legs))
        self.cores[k] = dense64(term).reshape(legs)

    def _rounded(self, k: int, cut: int) -> Expression:
        legs = self.cores[k].shape
        matrix = self.cores[k].reshape(prod(legs[:cut]), prod(legs[cut:]))
        format = self.formats[k]
        if format is None:
            return Dense(matrix.to(self.dtype))
        columns, rows = core_moments(local_problem(self.layer, self.cores, k, 1), cut)
        stats = LayerStats(Moments(columns, None, 1), gradient=Moments(rows, None, 1))
        found = self.run(matrix, stats, format)
        self.damping += [] if found.damping is None else [found.damping]
        self.notes += [f"core {k + 1}: {note}" for note in found.fallbacks]
        return refine(matrix, found.term, metric=Metric(columns, rows), sweeps=self.sweeps)

    def solve(self, k: int) -> None:
        """Put the best core k between the others."""
        self.cores[k] = best_core(self.layer, self.cores, k)

    def refit(self, first: int) -> None:
        """One sweep there and back over the cores from ``first`` on."""
        last = len(self.cores) - 1
        for k in range(first, last):
            self.solve(k)
            shift(self.cores, k, forward=True)
        for k in range(last, first - 1, -1):
            self.solve(k)
            if k > first:
                shift(self.cores, k, forward=False)

    def spread(self, first: int, seed: int) -> None:
        """The same operator, bonds behind core ``first`` weighing alike in both of their cores and all directions."""
        generator = torch.Generator().manual_seed(seed)
        for k in range(len(self.cores) - 1, first, -1):
            shift(self.cores, k, forward=False)
        scales = []
        for k in range(first, len(self.cores) - 1):
            U, s, Vh = torch.linalg.svd(self.cores[k].flatten(0, 2), full_matrices=False)
            self.cores[k] = U.reshape(*self.cores[k].shape[:3], len(s))
            self.cores[k + 1] = torch.tensordot(s.unsqueeze(1) * Vh, self.cores[k + 1], dims=1)
            scales.append(s.clamp_min(_UNSEEN * float(s[0])).sqrt() if float(s[0]) > 0 else torch.ones_like(s))
        for k, scale in enumerate(scales, first):
            square = torch.randn(len(scale), len(scale), generator=generator, dtype=torch.float64).to(scale.device)
            rotation = torch.linalg.qr(square).Q
            self.cores[k] = torch.tensordot(self.cores[k], scale.unsqueeze(1) * rotation.T, dims=1)
            self.cores[k + 1] = torch.tensordot(rotation / scale, self.cores[k + 1], dims=1)

    def error(self) -> float:
        """Squared error in the metric, as stored."""
        return self.layer.metric.squared_norm(self.layer.weight - Mpo(tuple(self.cores), self.features).to_dense())

    def chain(self) -> Chain:
        """The stored cores."""
        terms = [term for term in self.terms if term is not None]
        ranks = (1, *(core.shape[3] for core in self.cores))
        return Chain(tuple(terms), ranks, self.layer.out_modes, self.layer.in_modes, self.features)
