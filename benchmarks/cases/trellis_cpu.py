"""Trellis-coded layers on CPU for a few tokens: states decoded in registers beside the dense layer and einsum."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases.layers import beside_dense
from benchmarks.registry import Problem, case
from tnc import FactoredLinear
from tnc.formats import TrellisFormat
from tnc.terms import Quantized


def _build(bits: int, tokens: int, size: int = 4096) -> Problem:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (size, size), generator=generator).to(torch.uint8)
    scale = ((torch.rand(size, 1, generator=generator) + 0.1) / size**0.5).half()
    operator = Quantized.from_codes(codes, scale, None, TrellisFormat(bits, path="diagonal"))
    x = torch.randn(tokens, size, generator=generator)
    rows = ("trellis_cpu", "einsum") if tokens == 1 else ("trellis_cpu",)  # einsum takes as long for any tokens
    modules = {name: FactoredLinear(operator, backend=name) for name in rows}
    return beside_dense(operator, x, modules, repeats=31 if tokens <= 4 else 9, once=frozenset({"einsum"}))


for _bits in (2, 3, 4):
    for _tokens in (1, 2, 4, 16, 32, 256):
        case(f"trellis-cpu-{_bits}-{_tokens}", f"4096×4096 trellis of {_bits} bits, {_tokens} tokens, float32")(
            partial(_build, _bits, _tokens)
        )
