"""The Viterbi algorithm of `tnc.quant.viterbi` in C, built on first use: the same codes, bit for bit, much sooner."""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.compiled import call, library, missing
from tnc.quant.viterbi import Trellis, bound_of, linear_costs, window_of

_ROUNDED = "-ffp-contract=off"  # every product and sum is rounded by itself, as torch rounds it
_CODE = "quant/viterbi.c", _ROUNDED
_LANES = 16  # floats of the widest vector


def refusal(trellis: Trellis) -> str | None:
    """Why the codes of a trellis are not found in C, or ``None``; builds the code."""
    if trellis.bits not in (2, 3, 4) or len(trellis.levels) >> trellis.bits < _LANES:
        return f"it takes 2, 3 or 4 bits and at least {_LANES} groups of states"
    return missing(*_CODE)


def encode(trellis: Trellis, targets: Tensor, weights: Tensor) -> Tensor:
    """As `tnc.quant.viterbi.encode`, for rings of more than D codes.

    Cost: about ``4 T B 2**state_bits`` operations in vectors, ``4 T 2**(state_bits - bits)`` bytes a thread.
    """
    length, count = targets.shape
    half = window_of(trellis, length)
    codes = torch.empty(length, count, dtype=torch.uint8)
    held = _held(trellis, max(length, 2 * half + 1), count)
    sizes = length, count, half, trellis.digits, trellis.bits, len(held)
    call(library(*_CODE), "tnc_encode", (*_costs(trellis, targets, weights), codes, held), *sizes)
    return codes


def least_costs(trellis: Trellis, targets: Tensor, weights: Tensor) -> Tensor:
    """As `tnc.quant.viterbi.least_costs`, for rings of more than D codes."""
    length, count = targets.shape
    least, held = torch.empty(count), _held(trellis, 2, count)
    sizes = length, count, trellis.digits, trellis.bits, len(held)
    call(library(*_CODE), "tnc_least", (*_costs(trellis, targets, weights), least, held), *sizes)
    return bound_of(least, targets, weights)


def _costs(trellis: Trellis, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels by state, linear and quadratic costs (T, B)."""
    return trellis.levels, linear_costs(targets, weights).contiguous(), weights.contiguous()


def _held(trellis: Trellis, steps: int, count: int) -> Tensor:
    """Room (threads, steps, groups and a vector): the least costs that a thread keeps."""
    threads = max(min(torch.get_num_threads(), count), 1)
    return torch.empty(threads, steps, (len(trellis.levels) >> trellis.bits) + _LANES)
