"""One layer forward on this device: dense, rebuilt (`reference`), contracted (`einsum`)."""

from __future__ import annotations

import torch

from benchmarks.cases.layers import beside_dense
from benchmarks.registry import Problem, case
from tnc import FactoredLinear, IntFormat, LowRank, Sum, rtn


def _build(tokens: int, size: int = 2048, rank: int = 64) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * size**-0.5
    x = torch.randn(tokens, size, generator=generator)
    factors = LowRank(torch.randn(size, rank, generator=generator), torch.randn(rank, size, generator=generator) / size)
    operator = Sum((rtn(weight, IntFormat(4, group_size=64)), factors))
    modules = {
        f"int4 + rank {rank}, {name}": FactoredLinear(operator, backend=name) for name in ("reference", "einsum")
    }
    return beside_dense(operator, x, modules, repeats=9)


@case("forward-1", "2048×2048 int4 + rank 64, 1 token, float32")
def forward_1() -> Problem:
    """Decode."""
    return _build(1)


@case("forward-256", "2048×2048 int4 + rank 64, 256 tokens, float32")
def forward_256() -> Problem:
    """Prefill."""
    return _build(256)
