"""Adam over many small factors, each with steps relative to its own size, in a handful of launches.

`torch.optim.AdamW` takes such rates as one parameter group a factor and then updates them one by one: hundreds of
launches a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
_EPS = 1e-8


class FactorAdam:
    """Adam without weight decay (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1).

    Args:
        factors: name -> parameter, all on one device; a factor without a gradient counts as one of gradient zero.
        rates: name -> length of a full step, in the unit of the factor.
    """

    def __init__(self, factors: Mapping[str, nn.Parameter], rates: Mapping[str, float]) -> None:
        self.names = tuple(factors)
        self._factors: list[Tensor] = [factors[name] for name in self.names]
        self._rates = [rates[name] for name in self.names]
        self.means: list[Tensor] = [torch.zeros_like(factor) for factor in self._factors]
        self.squares: list[Tensor] = [torch.zeros_like(factor) for factor in self._factors]
        self.steps = 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One update with ``share`` of the rates."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        gradients = [torch.zeros_like(f) if f.grad is None else f.grad for f in self._factors]
        torch._foreach_lerp_(self.means, gradients, 1 - BETAS[0])
        torch._foreach_mul_(self.squares, BETAS[1])
        torch._foreach_addcmul_(self.squares, gradients, gradients, value=1 - BETAS[1])
        sizes = list(torch._foreach_sqrt(self.squares))
        torch._foreach_div_(sizes, second**0.5)
        torch._foreach_add_(sizes, _EPS)
        steps = list(torch._foreach_div(self.means, sizes))
        torch._foreach_mul_(steps, [-rate * share / first for rate in self._rates])
        torch._foreach_add_(self._factors, steps)
