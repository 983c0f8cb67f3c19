"""The trellis encoder: rings of Gaussian targets, and whole layers rounded in G ⊗ H, in torch and in C."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.registry import Problem, case
from tnc.formats import TrellisFormat
from tnc.quant import viterbi, viterbi_compiled, yaqa
from tnc.quant.trellis import trellis_of
from tnc.stats import LayerStats
from tnc.terms import Quantized


def _rings(bits: int, state_bits: int, count: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    trellis = trellis_of(TrellisFormat(bits, state_bits))
    problem = trellis, torch.randn(256, count, generator=generator), torch.rand(256, count, generator=generator)
    viterbi_compiled.refusal(trellis)  # builds the code
    first = viterbi.encode(*problem)
    return Problem(
        ways={"torch": partial(viterbi.encode, *problem), "C": partial(viterbi_compiled.encode, *problem)},
        errors=lambda codes: {"codes that differ": float((codes != first).sum())},
        limit={"codes that differ": 0.0},
        repeats=3,
        once=frozenset({"torch"}),
    )


def _layer(bits: int, size: int, torch_too: bool) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    sides = [torch.randn(size, 2 * size, generator=generator) for _ in range(2)]
    stats = LayerStats.from_hessian(*((s @ s.T).double() / (2 * size) for s in sides), tokens=2 * size)
    run = partial(_round, weight, stats, TrellisFormat(bits, path="diagonal"))
    return Problem(
        ways=({"in torch": partial(_in_torch, run)} if torch_too else {}) | {"in C": run},
        errors=lambda term: {"squared error": float((weight - term.to_dense()).square().mean())},
        limit={"squared error": {2: 0.13, 3: 0.04, 4: 0.012}[bits]},
        repeats=1 if size > 1024 else 3,
        once=frozenset({"in torch"}),
    )


def _round(weight: Tensor, stats: LayerStats, format: TrellisFormat) -> Quantized:
    return yaqa(weight, stats, format).term


def _in_torch(run: partial[Quantized]) -> Quantized:
    with patch.object(viterbi_compiled, "refusal", lambda trellis: "not asked"):
        return run()


for _bits, _state_bits, _count in ((2, 12, 32), (3, 12, 32), (4, 12, 32), (2, 14, 8), (2, 16, 2)):
    case(f"trellis-encoder-{_bits}-{_state_bits}", f"{_count} rings of 256, {_bits} bits, {_state_bits} state bits")(
        partial(_rings, _bits, _state_bits, _count)
    )
for _bits in (2, 3, 4):
    case(f"trellis-layer-512-{_bits}", f"512×512 by yaqa on a trellis of {_bits} bits")(
        partial(_layer, _bits, 512, True)
    )
    case(f"trellis-layer-4096-{_bits}", f"4096×4096 by yaqa on a trellis of {_bits} bits")(
        partial(_layer, _bits, 4096, False)
    )
