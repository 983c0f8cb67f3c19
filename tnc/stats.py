"""Calibration statistics of one linear layer: `H` of its inputs, `G` of its output gradients.

`Moments` is the token-weighted mean of ``x xᵀ`` over a set of tokens; it merges associatively, in any
order. `LayerStats` holds the moments of the calibration tokens, of a held-out share, and the Fisher factor
``G`` (MATH.md, symbols). Layers that see the same input tensor share one `Moments` object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.linalg.lapack import dpstrf  # type: ignore[attr-defined]
from torch import Tensor

from tnc.errors import ShapeError, StatsError, check_matrix, check_same_shape


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over ``tokens`` tokens.

    Attributes:
        second: (n, n) mean of ``x xᵀ``: the *hessian* of the layer-wise quadratic loss (GPTQ's is twice the sum).
        mean_abs: (n,) mean of ``|x|``, or ``None`` where only the second moment is known.
        tokens: number of tokens.
        cross: (n, n) mean of ``x xᵀ`` with the left x as the uncompressed model has it and the right one as here,
            behind compressed layers; ``None`` where both are the same or it was not asked for.
    """

    second: Tensor
    mean_abs: Tensor | None
    tokens: int
    cross: Tensor | None = None

    @property
    def features(self) -> int:
        """Width of ``x``."""
        return self.second.shape[0]

    @property
    def diagonal(self) -> Tensor:
        """(n,) mean of ``x²``."""
        return self.second.diagonal()

    @cached_property
    def rank(self) -> int:
        """Numerical rank of ``second`` by pivoted Cholesky; n³/3 flops, once.

        Pivots below ``eps(float32) max(diagonal)``, the noise of the float32 products, count as zero.
        """
        largest = float(self.diagonal.max()) if self.features else 0.0
        if largest <= 0:
            return 0
        tolerance = torch.finfo(torch.float32).eps * largest
        _, _, rank, _ = dpstrf(self.second.double().cpu().numpy(), tol=tolerance, lower=1)
        return int(rank)

    def to(self, device: torch.device) -> Moments:
        """The same moments on a device; themselves where they are there."""
        if self.second.device == device:
            return self
        mean_abs, cross = (None if each is None else each.to(device) for each in (self.mean_abs, self.cross))
        return Moments(self.second.to(device), mean_abs, self.tokens, cross)

    def over(self, tokens: int) -> Moments:
        """The mean over ``tokens`` tokens of which those here are the only ones that are not zero."""
        if tokens == self.tokens:
            return self
        share = self.tokens / tokens
        mean_abs = None if self.mean_abs is None else share * self.mean_abs
        return Moments(share * self.second, mean_abs, tokens, None if self.cross is None else share * self.cross)

    def merge(self, other: Moments) -> Moments:
        """Moments of both token sets together; commutative and associative up to float64 rounding."""
        check_same_shape(other.second.shape, self.second.shape, "second moment to merge", "the other one")
        tokens = self.tokens + other.tokens
        if tokens == 0:
            return self
        a, b = self.tokens / tokens, other.tokens / tokens
        mean_abs = None
        if self.mean_abs is not None and other.mean_abs is not None:
            mean_abs = a * self.mean_abs + b * other.mean_abs
        cross = None
        if self.cross is not None and other.cross is not None:
            cross = a * self.cross + b * other.cross
        return Moments(a * self.second + b * other.second, mean_abs, tokens, cross)


class MomentsAccumulator:
    """Running sums for `Moments`: products in float32 (float64 for float64 inputs), sums in float64."""

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self._second = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._abs = torch.zeros(features, dtype=torch.float64, device=device)
        self._cross: Tensor | None = None
        self._paired = 0
        self.tokens = 0

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add the rows of ``x`` (tokens, n); 2 tokens n² flops, twice that with ``dense``.

        Args:
            x: inputs of the layer.
            dense: (tokens, n) what the layer would have seen in the uncompressed model, token by token. The cross
                moment is kept only if every call brings rows that pair with those of ``x``.

        Raises:
            ShapeError: if the width differs from earlier rows.
        """
        if x.ndim != 2 or x.shape[1] != self._abs.shape[0]:
            raise ShapeError(
                f"activations have shape {tuple(x.shape)}; expected (tokens, {self._abs.shape[0]}) as before. "
                "A layer must keep its input width during calibration."
            )
        rows = x.detach() if x.dtype == torch.float64 else x.detach().float()  # float16 would overflow in x xᵀ
        self._second += rows.T @ rows
        self._abs += rows.abs().sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]
        if dense is not None and dense.shape == x.shape:
            product = dense.detach().to(rows.dtype).T @ rows
            self._cross = product.double() if self._cross is None else self._cross + product
            self._paired += x.shape[0]

    def moments(self) -> Moments:
        """The means so far (zero for no tokens)."""
        count = max(self.tokens, 1)
        paired = self._cross is not None and self._paired == self.tokens
        cross = self._cross / count if self._cross is not None and paired else None
        return Moments(self._second / count, self._abs / count, self.tokens, cross)


@dataclass(frozen=True, eq=False)
class LayerStats:
    """What calibration knows of one linear layer.

    Attributes:
        inputs: moments of the calibration tokens at the layer's input; ``inputs.second`` is ``H``.
        heldout: the same for the held-out share of tokens, or ``None``.
        gradient: moments of the gradient of the token loss at the layer's output, labels sampled from the
            model's own logits; ``gradient.second`` is ``G``. ``None`` where only activations were calibrated.
            The mean is over all tokens of the text, zero where a token does not pass the layer: the price of an
            expert's error counts how often the router chooses it.
        notes: a sentence for everything that differs from plain means over the layer's own tokens; reports
            carry them on.
    """

    inputs: Moments
    heldout: Moments | None = None
    gradient: Moments | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.inputs.tokens < 1:
            raise StatsError(
                "calibration statistics hold 0 tokens; expected at least 1. Pass calibration batches with unmasked "
                "tokens, or LayerStats.from_hessian(H, tokens=T) with T >= 1."
            )

    @classmethod
    def from_hessian(cls, H: Tensor, G: Tensor | None = None, *, tokens: int) -> LayerStats:
        """Statistics computed elsewhere.

        Args:
            H: (n, n) mean of ``x xᵀ``, symmetric positive semidefinite.
            G: (m, m) mean of ``g gᵀ``, or ``None``.
            tokens: number of tokens behind ``H``.

        Raises:
            StatsError: if a matrix is not square, not symmetric, or has a negative diagonal entry or eigenvalue
                (beyond 1e-4 of its largest entry).
            NonFiniteError: if one holds NaN or Inf.
        """
        inputs = Moments(_check_moment(H, "H"), None, tokens)
        return cls(inputs, None, None if G is None else Moments(_check_moment(G, "G"), None, tokens))

    @property
    def hessian(self) -> Tensor:
        """``H`` (n, n)."""
        return self.inputs.second

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.inputs.tokens

    def to(self, device: torch.device) -> LayerStats:
        """The same statistics on a device; themselves where they are there."""
        if all(each is None or each.second.device == device for each in (self.inputs, self.heldout, self.gradient)):
            return self
        heldout, gradient = (None if each is None else each.to(device) for each in (self.heldout, self.gradient))
        return LayerStats(self.inputs.to(device), heldout, gradient, self.notes)

    def merge(self, other: LayerStats) -> LayerStats:
        """Statistics of both token sets together."""
        return LayerStats(
            self.inputs.merge(other.inputs),
            _merge_optional(self.heldout, other.heldout),
            _merge_optional(self.gradient, other.gradient),
            tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def check_weight(self, weight: Tensor) -> None:
        """Raise `StatsError` unless the statistics fit a weight (m, n)."""
        rows, columns = weight.shape
        if self.inputs.features != columns:
            raise StatsError(
                f"statistics are of a layer with in_features={self.inputs.features}; the weight has shape "
                f"{tuple(weight.shape)}. Pass the statistics of this layer."
            )
        if self.gradient is not None and self.gradient.features != rows:
            raise StatsError(
                f"the gradient moment G is of a layer with out_features={self.gradient.features}; the weight has "
                f"shape {tuple(weight.shape)}. Pass the statistics of this layer."
            )


def _merge_optional(a: Moments | None, b: Moments | None) -> Moments | None:
    if a is None or b is None:
        return a or b
    return a.merge(b)


def _check_moment(matrix: Tensor, name: str) -> Tensor:
    check_matrix(matrix, name)
    matrix = matrix.double()
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if matrix.shape[0] != matrix.shape[1] or not torch.allclose(matrix, matrix.T, rtol=0.0, atol=1e-4 * scale):
        raise StatsError(f"{name} of shape {tuple(matrix.shape)} is not symmetric; expected a mean of x xᵀ.")
    if bool((matrix.diagonal() < 0).any()):
        raise StatsError(f"{name} has a negative diagonal entry; expected a mean of x xᵀ, which has none.")
    matrix = (matrix + matrix.T) / 2
    if not _is_semidefinite(matrix, slack=1e-4 * scale):
        raise StatsError(
            f"{name} is not positive semidefinite: it has an eigenvalue below {-1e-4 * scale:.3g}; expected a mean of "
            "x xᵀ. Sum the products in float32 or wider, and do not subtract or mask entries afterwards."
        )
    return matrix


def _is_semidefinite(matrix: Tensor, *, slack: float) -> bool:
    """Whether no eigenvalue is below ``-slack``; n³/3 flops."""
    shifted = matrix.clone()
    shifted.diagonal().add_(slack)
    return slack == 0 or int(torch.linalg.cholesky_ex(shifted)[1]) == 0
