"""TT-SVD: the matrix product operator of a matrix by one orthogonal split a bond (Oseledets 2011, algorithm 1).

The parts thrown away at different bonds are orthogonal to each other, so the squared error is exactly the sum of
their squared norms: the error is known, and certified, without rebuilding anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from operator import index

import torch
from torch import Tensor

from tnc.errors import BudgetError, RankError, check_finite, check_matrix
from tnc.metric import Metric
from tnc.networks.canonical import difference_norm
from tnc.networks.gram import energy
from tnc.networks.kronecker import KroneckerMetric
from tnc.networks.modes import Modes, check_pair, rank_bounds, site_modes, site_tensor
from tnc.networks.truncate import split
from tnc.terms import Mpo
from tnc.terms.base import wide

MaxRank = int | Sequence[int] | None

_DOUBLE_LIMIT = 2**20  # entries up to which everything is done in float64
_SINGLE_EPS = 1e-2  # relative error below which large float32 weights are split in float64 too


@dataclass(frozen=True, eq=False)
class MpoFit:
    """A matrix product operator and what is known of its error.

    Attributes:
        mpo: the operator as stored.
        error: relative error ``||W - Ŵ|| / ||W||`` in the Frobenius norm, or in the Kronecker-factored metric; an
            upper bound: exact before the cores are rounded to their dtype, plus the norm of that rounding.
        tails: squared norm discarded at each of the d - 1 bonds.
        notes: everything done otherwise than one might expect: padding, exact SVDs, a rank limit that was hit.
    """

    mpo: Mpo
    error: float
    tails: tuple[float, ...]
    notes: tuple[str, ...]


def tt_svd(
    weight: Tensor, out_modes: Sequence[int] | None = None, in_modes: Sequence[int] | None = None, *,
    max_rank: MaxRank = None, eps: float | None = None,
    metric: Metric | None = None, dtype: torch.dtype | None = None,
) -> Mpo:  # fmt: skip
    """The matrix product operator of ``weight`` by TT-SVD: `tt_svd_with_report` without the report."""
    return tt_svd_with_report(weight, out_modes, in_modes, max_rank=max_rank, eps=eps, metric=metric, dtype=dtype).mpo


def tt_svd_with_report(
    weight: Tensor, out_modes: Sequence[int] | None = None, in_modes: Sequence[int] | None = None, *,
    max_rank: MaxRank = None, eps: float | None = None,
    metric: Metric | None = None, dtype: torch.dtype | None = None,
) -> MpoFit:  # fmt: skip
    """A matrix product operator of ``weight`` by rank, by relative tolerance, or by both, and its error.

    By rank the squared error is at most d - 1 times that of the best operator with these ranks; by tolerance
    ``||W - Ŵ|| <= eps ||W||`` holds for the cores **as stored**. Without either the result is exact.

    Args:
        weight: (out_features, in_features), any float dtype; not changed, not aliased.
        out_modes: d output modes, product at least out_features (more is padding); ``None``: two balanced ones.
        in_modes: d input modes.
        max_rank: one limit for all bonds, or d - 1 limits; each is also limited by its unfolding.
        eps: relative error allowed, in [0, 1). A bond may use what earlier bonds left of the budget.
        metric: norm of the errors; ``None`` is the Frobenius norm. A full metric would mix the modes, so the nearest
            Kronecker-factored one takes its place (`KroneckerMetric`): tolerance and error are relative in that.
        dtype: of the stored cores; ``None`` is the dtype of ``weight``.

    Raises:
        ShapeError: if the modes do not fit (lists factorizations that do).
        RankError: if ``max_rank`` is not a positive integer or d - 1 of them.
        BudgetError: if ``eps`` is out of range, or cores stored in ``dtype`` cannot meet it.
        NonFiniteError: if ``weight`` holds NaN or Inf.

    Cost: see `split`; float64 for weights of up to 2**20 entries, of float64, and for ``eps < 1e-2``, else float32
    products summed in float64. Memory: one permuted copy of ``weight``.
    Source: Oseledets 2011 (SIAM J. Sci. Comput. 33, 2295), theorem 2.2.
    """
    check_matrix(weight, "weight")
    outs, ins = _modes(weight, out_modes, in_modes)
    limits = check_ranks(max_rank, outs, ins, "tt_svd")
    stored = dtype or weight.dtype
    white = None if metric is None else KroneckerMetric.nearest(metric, weight, outs, ins)
    if eps is None:
        (fit,) = _sweep(weight.unsqueeze(0), outs, ins, limits, None, stored, white)
        return fit
    return _within(weight, outs, ins, limits, check_eps(eps, "tt_svd"), stored, white)


def tt_svd_batched(
    weights: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], *, max_rank: MaxRank = None,
    dtype: torch.dtype | None = None,
) -> list[MpoFit]:  # fmt: skip
    """`tt_svd_with_report` by rank of many matrices of one shape (batch, out_features, in_features) at once.

    Raises:
        ShapeError, RankError, NonFiniteError: as `tt_svd_with_report`.
    """
    check_finite(weights, "weights")
    outs, ins = check_pair((weights.shape[-2], weights.shape[-1]), out_modes, in_modes)
    return _sweep(weights, outs, ins, check_ranks(max_rank, outs, ins, "tt_svd_batched"), None, dtype or weights.dtype)


def check_ranks(max_rank: MaxRank, out_modes: Modes, in_modes: Modes, caller: str) -> Modes:
    """Limits of the d - 1 bonds as Python ints, none above its unfolding.

    Raises:
        RankError: if one is not a positive integer, or their number is not d - 1.
    """
    bounds = rank_bounds(out_modes, in_modes)
    if max_rank is None:
        return bounds
    given = list(max_rank) if isinstance(max_rank, Sequence) else [max_rank] * len(bounds)
    if len(given) != len(bounds) or not all(_is_rank(each) for each in given):
        raise RankError(
            f"{caller}(max_rank={max_rank!r}) with {len(out_modes)} cores; expected a positive integer or "
            f"{len(bounds)} of them, at most {list(bounds)} are of use."
        )
    return tuple(min(index(each), bound) for each, bound in zip(given, bounds, strict=True))


def check_eps(eps: float, caller: str) -> float:
    """``eps`` if it is in [0, 1).

    Raises:
        BudgetError: otherwise.
    """
    if not 0 <= eps < 1:
        raise BudgetError(f"{caller}(eps={eps}) is outside [0, 1); 1 is the error of storing nothing.")
    return float(eps)


def _is_rank(value: object) -> bool:
    try:
        return not isinstance(value, bool) and index(value) >= 1  # type: ignore[arg-type]
    except TypeError:
        return False


def _modes(weight: Tensor, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None) -> tuple[Modes, Modes]:
    shape = (weight.shape[0], weight.shape[1])
    d = len(out_modes) if out_modes is not None else len(in_modes) if in_modes is not None else 2
    balanced = site_modes(shape, d)
    return check_pair(shape, out_modes or balanced[0], in_modes or balanced[1])


def _within(
    weight: Tensor,
    outs: Modes,
    ins: Modes,
    limits: Modes,
    eps: float,
    dtype: torch.dtype,
    white: KroneckerMetric | None,
) -> MpoFit:
    """Meet ``eps`` as stored: what rounding the cores costs is taken off the budget of a second try."""
    budget = eps
    for _ in range(3):
        (fit,) = _sweep(weight.unsqueeze(0), outs, ins, limits, budget, dtype, white)
        if fit.error <= eps or any("max_rank" in note for note in fit.notes):
            return fit
        budget = eps - 1.1 * (fit.error - budget)
        if budget <= 0:
            break
    raise BudgetError(
        f"tt_svd(eps={eps}) cannot be met with cores stored in {dtype}: rounding them alone costs about "
        f"{fit.error:.1e}. Ask for more, or store the cores in a wider dtype."
    )


def _sweep(
    weights: Tensor,
    outs: Modes,
    ins: Modes,
    limits: Modes,
    eps: float | None,
    dtype: torch.dtype,
    white: KroneckerMetric | None = None,
) -> list[MpoFit]:
    """One left-to-right sweep over a batch (b, m, n); with ``eps`` the batch is one matrix."""
    batch, rows, columns = weights.shape
    exacting = weights[0].numel() <= _DOUBLE_LIMIT or (eps is not None and eps < _SINGLE_EPS)
    rest = site_tensor(weights, outs, ins, torch.float64 if exacting else wide(weights))
    if white is not None:
        rest = white.whitened(rest.squeeze(0)).unsqueeze(0)
    total = energy(rest.reshape(batch, 1, -1)).cpu()
    left = None if eps is None else eps**2 * float(total)
    cores, tails, notes = [], [], padding_notes((rows, columns), outs, ins)
    rank = 1
    for k, limit in enumerate(limits):
        rest = rest.reshape(batch, rank * outs[k] * ins[k], -1)
        allowed = None if left is None else left / (len(limits) - k)
        step = split(rest, limit, allowed)
        cores.append(step.basis.reshape(batch, rank, outs[k], ins[k], -1))
        tails.append(step.tail.cpu())
        rest, rank = step.rest, step.basis.shape[-1]
        notes += [f"bond {k + 1}: {step.note}"] if step.note else []
        if allowed is not None and left is not None:
            over = float(step.tail) > allowed
            notes += [f"bond {k + 1}: max_rank={limit} leaves more than eps allows"] if over else []
            left = max(left - float(step.tail), 0.0)
    cores.append(rest.reshape(batch, rank, outs[-1], ins[-1], 1))
    discarded = torch.stack(tails, dim=-1) if tails else torch.zeros(batch, 0, dtype=torch.float64)
    return [
        _stored(Mpo(tuple(c[b] for c in cores), (rows, columns)), dtype, discarded[b], float(total[b]), notes, white)
        for b in range(batch)
    ]


def padding_notes(shape: tuple[int, int], outs: Modes, ins: Modes) -> list[str]:
    """A sentence where the modes multiply to more than the features."""
    full = (prod(outs), prod(ins))
    return [] if full == shape else [f"padded from {shape} to {full}: the padding is stored"]


def _stored(
    whitened: Mpo, dtype: torch.dtype, discarded: Tensor, total: float, notes: list[str], white: KroneckerMetric | None
) -> MpoFit:
    """The operator in ``dtype``, with what rounding it costs added to the error."""
    mpo = whitened if white is None else white.unwhitened(whitened)
    stored = Mpo(tuple(core.to(dtype, copy=True).contiguous() for core in mpo.cores), mpo.features)
    if dtype == mpo.cores[0].dtype:
        rounding = 0.0
    else:
        rounding = difference_norm(*(each if white is None else white.on_cores(each) for each in (mpo, stored)))
    size = total**0.5
    error = (float(discarded.sum()) ** 0.5 + rounding) / size if size > 0 else 0.0
    return MpoFit(stored, error, tuple(discarded.tolist()), tuple(notes))
