"""The Viterbi algorithm on a bitshift trellis: the codes of a sequence of least squared error.

A state is ``D = state_bits / bits`` digits in base ``K = 2**bits``, the last D codes. Costs are kept with one
axis a digit, the code of time t on axis ``t mod D``: there the oldest code is minimised out and the newest comes
in, so nothing is ever shuffled in memory.

Costs are float32, ``(level * w + l) * level`` with ``l = -2 w target``, plus the least before, each operation rounded
by itself; ties go to the lowest digit. `tnc.quant.viterbi_compiled` does the same operations and finds the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DEPTH = 8  # times D: codes on each side after which a survivor path no longer depends on the ends
_FAR = 1e30


@dataclass(frozen=True, eq=False)
class Trellis:
    """Levels of every state, ``state = sum_i code(t - i) K**i``, arranged for each time modulo D.

    Attributes:
        bits: new bits a step.
        digits: D.
        values: (D, K**D) float32; row a is the order of memory at times ``t mod D = a``.
    """

    bits: int
    digits: int
    values: Tensor

    @classmethod
    def of(cls, levels: Tensor, bits: int) -> Trellis:
        """The trellis of levels (2**state_bits,) by state."""
        K, D = 1 << bits, (len(levels).bit_length() - 1) // bits
        cube = levels.to(torch.float32).reshape([K] * D)  # axis j is the code of j - (D - 1) steps ago
        axes = [[D - 1 - (a - slot) % D for slot in range(D)] for a in range(D)]
        return cls(bits, D, torch.stack([cube.permute(order).reshape(-1) for order in axes]))

    @property
    def levels(self) -> Tensor:
        """(K**D,) levels by state: memory at slot D - 1 runs from the oldest code to the newest."""
        return self.values[self.digits - 1]

    def stride(self, time: int) -> int:
        """Distance in memory between neighbouring codes of a time."""
        return 1 << self.bits * (self.digits - 1 - time % self.digits)


def encode(trellis: Trellis, targets: Tensor, weights: Tensor) -> Tensor:
    """Codes of rings of least ``sum_t weights_t (targets_t - level(state_t))²``, nearly.

    Tail-biting in two passes as QTIP (arXiv:2406.11235, algorithm 4): the codes around the seam are found on a
    window with free ends, then the ring is solved exactly with those before its start fixed. Rings of at most D
    codes are searched exhaustively.

    Args:
        trellis: levels.
        targets: (T, B) float32 on the CPU, B rings.
        weights: (T, B) at least 0.

    Returns:
        Codes (T, B) uint8.

    Cost: about ``4 T B 2**state_bits`` operations, ``4 T B 2**state_bits`` bytes.
    """
    length, D = len(targets), trellis.digits
    if length <= D:
        return _exhaustive(trellis, targets, weights)
    half = window_of(trellis, length)
    window = torch.arange(-half, half) % length
    costs = _costs(trellis, targets[window], weights[window], None)
    seam = _trace(trellis, costs, _cheapest(trellis, costs[-1], 2 * half - 1), half - D + 1)[half - D + 1 : half]
    start = torch.full((targets.shape[1], trellis.values.shape[1] >> trellis.bits), _FAR)
    start[torch.arange(len(start)), torch.from_numpy(_place(trellis, seam, 0))] = 0  # without slot 0, the outermost
    costs = _costs(trellis, targets, weights, start)
    end = _best(trellis, costs[-1].numpy(), _place(trellis, seam, length), trellis.stride(length))
    return torch.from_numpy(_trace(trellis, costs, end, 0))


def window_of(trellis: Trellis, length: int) -> int:
    """Codes on each side of the seam of a ring that the first pass looks at."""
    return min(max(length // 2, trellis.digits), _DEPTH * trellis.digits)


def least_costs(trellis: Trellis, targets: Tensor, weights: Tensor) -> Tensor:
    """(B,) float64, at most the weighted squared error of any ring: the optimum over open sequences.

    Rounding in float32 is taken off.
    """
    if len(targets) <= trellis.digits:
        least = _ring_costs(trellis, targets, weights)[0].amin(-1)
    else:
        least = _costs(trellis, targets, weights, None)[-1].amin(-1)
    return bound_of(least, targets, weights)


def bound_of(least: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(B,) float64: least float32 costs less ``weights * targets²`` as squared errors, their rounding taken off."""
    energy = (weights.double() * targets.double().square()).sum(0)
    slack = 4 * len(targets) * torch.finfo(torch.float32).eps
    return (energy + least.double() - slack * (energy + least.double().abs())).clamp_min(0)


def _costs(trellis: Trellis, targets: Tensor, weights: Tensor, start: Tensor | None) -> Tensor:
    """(T, B, states): least cost of a path that ends there at t, less ``weights * targets²``."""
    (length, count), K, D = targets.shape, 1 << trellis.bits, trellis.digits
    costs = torch.empty(length, count, trellis.values.shape[1])
    linear, quadratic = linear_costs(targets, weights).unsqueeze(-1), weights.unsqueeze(-1)
    for slot in range(min(D, length)):  # what every state costs by itself, all times of a slot at once
        level, own = trellis.values[slot], costs[slot::D]
        torch.mul(level, quadratic[slot::D], out=own).add_(linear[slot::D]).mul_(level)
    least = None if start is None else start.view(count, 1, 1, -1)
    for t, now in enumerate(costs):
        if least is not None:
            now.view(count, K ** (t % D), K, -1).add_(least)
        least = now.view(count, K ** ((t + 1) % D), K, -1).amin(2, keepdim=True)
    return costs


def linear_costs(targets: Tensor, weights: Tensor) -> Tensor:
    """What a level costs per unit besides its square."""
    return -2 * weights * targets


def _cheapest(trellis: Trellis, costs: Tensor, time: int) -> NDArray[np.int64]:
    """Where in memory the cheapest states (B,) of costs (B, states) at a time lie.

    Of several those of the lowest newer codes, of these the one of the lowest oldest code.
    """
    D = trellis.digits
    places = torch.arange(costs.shape[1]).reshape([1 << trellis.bits] * D)
    slots = [(time + 1 + i) % D for i in range(D)]  # of the codes from the oldest on
    order = places.permute([*slots[1:], slots[0]]).reshape(-1).numpy()
    found: NDArray[np.int64] = order[costs.numpy()[:, order].argmin(1)]
    return found


def _trace(trellis: Trellis, costs: Tensor, end: NDArray[np.int64], first: int) -> NDArray[np.uint8]:
    """Codes (T, B) of the paths that end in the given states, from time ``first`` on."""
    held, state = costs.numpy(), end
    codes = np.zeros((len(held), held.shape[1]), dtype=np.uint8)
    for t in range(len(held) - 1, first - 1, -1):
        stride = trellis.stride(t)
        code = state // stride % (1 << trellis.bits)
        codes[t] = code
        if t > first:
            state = _best(trellis, held[t - 1], state - code * stride, stride)
    return codes


def _place(trellis: Trellis, seam: NDArray[np.uint8], time: int) -> NDArray[np.int64]:
    """Where in memory the last D - 1 codes (D - 1, B) before ``time`` lie, the slot of ``time`` itself at 0."""
    place = np.zeros(seam.shape[1], dtype=np.int64)
    for i, codes in enumerate(seam[::-1], start=1):
        place += codes.astype(np.int64) * trellis.stride(time - i)
    return place


def _best(trellis: Trellis, costs: NDArray[np.float32], base: NDArray[np.int64], stride: int) -> NDArray[np.int64]:
    """The cheapest of the states that differ from ``base`` in one digit only."""
    steps = np.arange(1 << trellis.bits) * stride
    found = costs[np.arange(len(base))[:, None], base[:, None] + steps]
    best: NDArray[np.int64] = base + found.argmin(1) * stride
    return best


def _exhaustive(trellis: Trellis, targets: Tensor, weights: Tensor) -> Tensor:
    costs, codes = _ring_costs(trellis, targets, weights)
    return codes[:, costs.argmin(-1)].to(torch.uint8)


def _ring_costs(trellis: Trellis, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Costs (B, rings) of all short rings less ``weights * targets²``, and their codes (T, rings)."""
    length, bits, D = len(targets), trellis.bits, trellis.digits
    every = torch.arange(1 << bits * length)
    codes = torch.stack([every >> bits * t & ((1 << bits) - 1) for t in range(length)])
    states = sum(codes.roll(i, 0) << bits * i for i in range(D))
    levels = trellis.levels[states]  # (T, rings)
    return weights.T @ levels.square() - 2 * (weights * targets).T @ levels, codes
