"""Layers that see the same inputs, such as q/k/v and gate/up, with one right factor for all of them.

``min Σ_i tr((D_i - L_i R)ᵀ G_i (D_i - L_i R) H)`` is the low-rank problem of the stacked ``G_i^½ D_i`` in H. Its right
factor is shared, and each left factor is refitted by itself: ``L_i = D_i H Rᵀ (R H Rᵀ)⁺``, from which G_i cancels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.column_space import column_space
from tnc.decompose.engine import Decomposition, bits_of_others
from tnc.decompose.factor_formats import FactorFormats
from tnc.decompose.factors import quantize_shared_factors
from tnc.decompose.report import measure
from tnc.decompose.sizes import BitsPerWeight, RelativeError, check_useful, fixed_rank, float_bits, rank_within_bits
from tnc.decompose.stages import Fitted, LowRankStage, Stage, Target
from tnc.errors import RecipeError, check_matrix
from tnc.metric import Metric, root
from tnc.stats import LayerStats
from tnc.terms import Expression, LowRank, Product, Sum, dense64


def decompose_shared(
    weights: Sequence[Tensor], stages: Sequence[Stage], stats: Sequence[LayerStats], *, sweeps: int = 1
) -> list[Decomposition]:
    """`decompose` for layers with the same inputs; low-rank stages give them one right factor.

    Args:
        weights: (m_i, n) each.
        stages: fitted in this order; all but `LowRankStage` for each layer by itself.
        stats: of each layer, all with one and the same ``inputs`` object.
        sweeps: rounds over the stages; the iterate of least error over all layers is kept.

    Returns:
        A decomposition a layer, in order. Their operators hold the right factor as one and the same tensors, and
        each report counts its share of them: the ``storage_bits`` of all layers add up to what is stored.

    Raises:
        RecipeError: for layers with other inputs, or a rank given by an error.
        RankError: also for a rank above mn/(m+n), m the rows of all layers, unless it is a `Rank` that is forced.
        RankError, FormatError, BudgetError, NonFiniteError: as the stages say.
    """
    for weight, each in zip(weights, stats, strict=True):
        check_matrix(weight, "weight")
        each.check_weight(weight)
    if not stages or sweeps < 1 or len({id(each.inputs) for each in stats}) != 1:
        raise RecipeError(
            f"decompose_shared got {len(stages)} stages, sweeps={sweeps} and {len({id(s.inputs) for s in stats})} "
            "different inputs; expected at least one stage and sweep, and layers that share their input moments."
        )
    for stage in stages:
        if isinstance(stage, LowRankStage):
            check_useful(stage.rank, (sum(len(w) for w in weights), weights[0].shape[1]), "LowRankStage")
    start = time.perf_counter()
    fits = _descend(_Group(tuple(weights), tuple(stats)), stages, sweeps)
    seconds = (time.perf_counter() - start) / len(weights)
    operators = [parts[0].term if len(parts) == 1 else Sum(tuple(f.term for f in parts)) for parts in fits]
    shares = charged_bits(operators)
    return [
        _reported(weight, operator, each, parts, shared, seconds)
        for weight, operator, each, parts, shared in zip(weights, operators, stats, fits, shares, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Group:
    weights: tuple[Tensor, ...]
    stats: tuple[LayerStats, ...]

    @property
    def rows(self) -> int:
        return sum(len(weight) for weight in self.weights)

    @property
    def columns(self) -> int:
        return self.weights[0].shape[1]


def _descend(group: _Group, stages: Sequence[Stage], sweeps: int) -> list[list[Fitted]]:
    """The terms of every layer at the best iterate."""
    metrics = [Metric.auto(each) for each in group.stats]
    current: list[list[Fitted]] = [[] for _ in stages]  # a fit a layer
    best: tuple[float, list[list[Fitted]]] | None = None
    for sweep in range(sweeps):
        for k, stage in enumerate(stages):
            current[k] = _fit(group, stage, _targets(group, stages, current, k, sweep))
        error = sum(
            metric.squared_norm(weight.double() - sum(dense64(fits[i].term) for fits in current))
            for i, (metric, weight) in enumerate(zip(metrics, group.weights, strict=True))
        )
        if best is None or error < best[0]:
            best = error, list(current)
    assert best is not None, "sweeps is at least 1"
    return [[fits[i] for fits in best[1]] for i in range(len(group.weights))]


def _targets(
    group: _Group, stages: Sequence[Stage], current: Sequence[Sequence[Fitted]], k: int, sweep: int
) -> list[Target]:
    targets = []
    for i, (weight, stats) in enumerate(zip(group.weights, group.stats, strict=True)):
        terms = [fits[i] if fits else None for fits in current]
        residual = weight.double()
        for each in (each for j, each in enumerate(terms) if j != k and each is not None):
            residual = residual - dense64(each.term)
        spent = bits_of_others(k, stages, terms, (weight.shape[0], weight.shape[1]))
        targets.append(Target(residual, weight, stats, spent, sweep))
    return targets


def _fit(group: _Group, stage: Stage, targets: Sequence[Target]) -> list[Fitted]:
    if isinstance(stage, LowRankStage):
        return _fit_low_rank(group, stage, targets)
    return [stage.fit(target) for target in targets]


def _fit_low_rank(group: _Group, stage: LowRankStage, targets: Sequence[Target]) -> list[Fitted]:
    if stage.first is not None and targets[0].sweep == 0:
        stage = stage.started()
    metrics = [_metric(stage, target) for target in targets]
    dtype = stage.dtype or group.weights[0].dtype
    formats = None if stage.factor_format is None else FactorFormats.of(stage.factor_format)
    rank = _rank(group, stage, dtype, formats, sum(target.spent_bits for target in targets))
    lefts, right = shared_factors([target.residual for target in targets], metrics, rank)
    if formats is None or rank == 0:
        right = right.to(dtype)
        return [Fitted(LowRank(left.to(dtype), right)) for left in lefts]
    residuals = [target.residual for target in targets]
    found = quantize_shared_factors(residuals, lefts, right, metrics, formats, method=stage.factor_method)
    return [Fitted(Product((left, found.right)), found.damping, found.fallbacks) for left in found.lefts]


def _metric(stage: LowRankStage, target: Target) -> Metric:
    if not callable(stage.metric) or target.stats is None:
        raise RecipeError("a shared right factor takes one metric of calibrated layers; use it without Gate.")
    return stage.metric(target.stats)


def _rank(
    group: _Group, stage: LowRankStage, dtype: torch.dtype, formats: FactorFormats | None, spent_bits: int
) -> int:
    """The rank of a size; the budget of `BitsPerWeight` is that of all layers together."""
    shape, size = (group.rows, group.columns), stage.rank
    if isinstance(size, RelativeError):
        raise RecipeError(f"a shared right factor takes a rank or BitsPerWeight; got {size}.")
    if not isinstance(size, BitsPerWeight):
        return fixed_rank(size, (min(len(w) for w in group.weights), group.columns), "LowRankStage")
    ranks = [k for k in range(min(shape) + 1) if formats is None or formats.fits(k)]

    def bits(rank: int) -> int:
        if formats is None or rank == 0:
            return float_bits(shape, rank, dtype)
        lefts = sum(formats.left.stored_bits((len(weight), rank)) for weight in group.weights)
        return lefts + formats.right.stored_bits((rank, group.columns))

    return rank_within_bits(size, shape, spent_bits, bits, ranks)


def shared_factors(
    residuals: Sequence[Tensor], metrics: Sequence[Metric], rank: int
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Float64 factors, rows of the right one as long as the columns of the left ones together.

    Args:
        residuals: (m_i, n) each, float64.
        metrics: with one H; a G each, or none.
        rank: k of the right factor.

    Returns:
        A left factor (m_i, k) for each residual, and the right factor (k, n). The first components of a large rank are
        those of a smaller one.
    """
    stacked = torch.cat([_rooted(d, metric) for d, metric in zip(residuals, metrics, strict=True)])
    space = column_space(stacked, rank, Metric(metrics[0].hessian))
    right = space.right.double()
    lefts = [metrics[0].times_hessian(d) @ right.T / space.captured for d in residuals]
    column = torch.stack([left.square().sum(0) for left in lefts]).sum(0).sqrt()
    row: Tensor = torch.linalg.vector_norm(right, dim=1)
    scale = torch.where((column > 0) & (row > 0), (row / column).sqrt(), 1.0)
    missing = rank - len(right)
    lefts = [torch.nn.functional.pad(left * scale, (0, missing)) for left in lefts]
    return lefts, torch.nn.functional.pad(right / scale.unsqueeze(1), (0, 0, 0, missing))


def _rooted(residual: Tensor, metric: Metric) -> Tensor:
    """``Sᵀ D`` with ``S Sᵀ = G``."""
    side = root(metric.gradient)
    if side is None:
        return residual
    return side.unsqueeze(1) * residual if side.ndim == 1 else side.T @ residual


def shared_tensors(operators: Sequence[Expression]) -> dict[int, Tensor]:
    """Tensors that more than one operator stores, by ``id``."""
    seen: dict[int, int] = {}
    for operator in operators:
        for key in {id(tensor) for tensor in operator.tensors().values()}:
            seen[key] = seen.get(key, 0) + 1
    return {id(t): t for operator in operators for t in operator.tensors().values() if seen[id(t)] > 1}


def charged_bits(operators: Sequence[Expression]) -> list[int]:
    """Bits that each operator is charged: its own, and an equal share of what all store together.

    What does not divide is charged to the first; the sum is what is stored.
    """
    common = shared_tensors(operators)
    together = sum(t.numel() * t.element_size() * 8 for t in common.values())
    own = [sum(t.numel() * t.element_size() * 8 for t in operator.tensors().values() if id(t) not in common)
           for operator in operators]  # fmt: skip
    each, rest = divmod(together, len(operators))
    return [bits + each + (rest if i == 0 else 0) for i, bits in enumerate(own)]


def _reported(
    weight: Tensor, operator: Expression, stats: LayerStats, parts: Sequence[Fitted], bits: int, seconds: float
) -> Decomposition:
    report = measure(
        weight, operator, stats,
        damping=max((f.damping for f in parts if f.damping is not None), default=None),
        fallbacks=tuple(note for f in parts for note in f.fallbacks),
        seconds=seconds,
    )  # fmt: skip
    return Decomposition(operator, replace(report, storage_bits=bits, bits_per_weight=bits / weight.numel()))
