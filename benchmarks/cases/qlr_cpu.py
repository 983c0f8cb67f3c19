"""Weight-only layers on CPU for a few tokens: codes decoded in registers beside the dense layer and einsum."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases.layers import ERROR, beside_dense, integers, off
from benchmarks.registry import Problem, case
from tnc import FactoredLinear, LowRank, Sum
from tnc.terms import dense64


def _build(bits: int, tokens: int, size: int = 4096, rank: int = 64) -> Problem:
    generator = torch.Generator().manual_seed(0)
    base = integers(size, size, bits, generator)
    left = torch.randn(size, rank, generator=generator) / size**0.5
    factors = LowRank(left, torch.randn(rank, size, generator=generator) / size**0.5)
    operator = Sum((base, factors))
    x = torch.randn(tokens, size, generator=generator)
    modules = {f"int{bits} + rank {rank}": FactoredLinear(operator, backend="qlr_cpu"),
               f"int{bits}": FactoredLinear(base, backend="qlr_cpu"),
               f"int{bits} + rank {rank}, einsum": FactoredLinear(operator, backend="einsum")}  # fmt: skip
    alone = x.double() @ dense64(base).T
    whole = beside_dense(operator, x, modules, repeats=15 if tokens <= 4 else 5)
    return replace(whole, errors=lambda y: {ERROR: min(whole.errors(y)[ERROR], off(y, alone))})


for _bits in (2, 4, 8):
    for _tokens in (1, 2, 4, 16, 256):
        case(f"qlr-cpu-{_bits}-{_tokens}", f"4096×4096 int{_bits} group 128, {_tokens} tokens, float32")(
            partial(_build, _bits, _tokens)
        )
