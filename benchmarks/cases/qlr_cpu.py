"""Weight-only layers on CPU for a few tokens: codes decoded in registers beside the dense layer and einsum."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.registry import Problem, case
from tnc import FactoredLinear, IntFormat, LowRank, Sum
from tnc.terms import Quantized, dense64


def _build(bits: int, tokens: int, size: int = 4096, rank: int = 64) -> Problem:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (size, size), generator=generator)
    zero = torch.randint(0, 2**bits, (size, size // 128), generator=generator)
    scale = ((torch.rand(size, size // 128, generator=generator) + 0.1) / 2**bits / size**0.5).half()
    base = Quantized.from_codes(codes, scale, zero, IntFormat(bits, group_size=128))
    left = torch.randn(size, rank, generator=generator) / size**0.5
    factors = LowRank(left, torch.randn(rank, size, generator=generator) / size**0.5)
    operator = Sum((base, factors))
    x = torch.randn(tokens, size, generator=generator)
    exact = dense64(operator)
    expected, dense = x.double() @ exact.T, torch.nn.Linear(size, size, bias=False)
    dense.weight.data.copy_(exact)
    modules = {f"int{bits} + rank {rank}": FactoredLinear(operator, backend="qlr_cpu"),
               f"int{bits}": FactoredLinear(base, backend="qlr_cpu"),
               f"int{bits} + rank {rank}, einsum": FactoredLinear(operator, backend="einsum")}  # fmt: skip
    alone = x.double() @ dense64(base).T
    ways = {"dense nn.Linear": partial(run, dense, x)}
    return Problem(
        ways=ways | {name: partial(run, module, x) for name, module in modules.items()},
        errors=lambda y: {
            "relative error": float(min((y - to).norm() / to.norm() for to in (expected, alone))),
        },
        limit={"relative error": 1e-5},
        repeats=15 if tokens <= 4 else 5,
    )


def run(module: torch.nn.Module, x: Tensor) -> Tensor:
    """What the module makes of x, without gradients."""
    with torch.no_grad():
        y: Tensor = module(x)
    return y


for _bits in (2, 4, 8):
    for _tokens in (1, 2, 4, 16, 256):
        case(f"qlr-cpu-{_bits}-{_tokens}", f"4096×4096 int{_bits} group 128, {_tokens} tokens, float32")(
            partial(_build, _bits, _tokens)
        )
