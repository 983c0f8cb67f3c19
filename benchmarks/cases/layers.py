"""What cases of one factored layer on CPU share: random integer weights, and modules beside the dense layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.registry import Problem
from tnc import IntFormat
from tnc.terms import Expression, Quantized, dense64

GROUP = 128
ERROR = "relative error"
LIMIT = {ERROR: 1e-5}


def integers(rows: int, columns: int, bits: int, generator: torch.Generator) -> Quantized:
    """Random codes, zero points and scales, groups of 128."""
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zero = torch.randint(0, 2**bits, (rows, columns // GROUP), generator=generator)
    scale = ((torch.rand(rows, columns // GROUP, generator=generator) + 0.1) / 2**bits / columns**0.5).half()
    return Quantized.from_codes(codes, scale, zero, IntFormat(bits, group_size=GROUP))


def run(module: nn.Module, x: Tensor) -> Tensor:
    """What the module makes of x, without gradients."""
    with torch.no_grad():
        y: Tensor = module(x)
    return y


def dense_layer(operator: Expression) -> nn.Linear:
    """The matrix of an operator as a layer, float32."""
    layer = nn.Linear(operator.shape[1], operator.shape[0], bias=False)
    layer.weight.data.copy_(dense64(operator))
    return layer


def off(y: Tensor, expected: Tensor) -> float:
    """Relative error of outputs."""
    return float((y - expected).norm() / expected.norm())


def beside_dense(
    operator: Expression, x: Tensor, modules: Mapping[str, nn.Module], *, repeats: int,
    once: frozenset[str] = frozenset(),
) -> Problem:  # fmt: skip
    """Modules of an operator, each against the operator in float64 and timed beside the dense layer."""
    expected = x.double() @ dense64(operator).T
    layers: dict[str, nn.Module] = {"dense nn.Linear": dense_layer(operator), **modules}
    return Problem(
        ways={name: partial(run, layer, x) for name, layer in layers.items()},
        errors=lambda y: {ERROR: off(y, expected)},
        limit=LIMIT,
        repeats=repeats,
        once=once,
    )
