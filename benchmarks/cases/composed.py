"""Rotated, scaled and permuted int4 layers on CPU: transform, fused middle, transform beside einsum and dense."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cases.layers import beside_dense, integers
from benchmarks.registry import Problem, case
from tnc import FactoredLinear, LowRank, Sum
from tnc.terms import Diagonal, Expression, Hadamard, Permutation, Product, Quantized

SIZE, RANK = 4096, 64


def _middle(generator: torch.Generator) -> tuple[Quantized, LowRank]:
    base = integers(SIZE, SIZE, 4, generator)
    left = torch.randn(SIZE, RANK, generator=generator) / SIZE**0.5
    right = torch.randn(RANK, SIZE, generator=generator) / SIZE**0.5
    return base, LowRank(left, right)


def _rotated(base: Quantized, factors: LowRank) -> Expression:
    return Product((Sum((base, factors)), Hadamard.random(SIZE)))


def _two_sided(base: Quantized, factors: LowRank) -> Expression:
    return Product((Hadamard.random(SIZE, seed=1).inverse(), Sum((base, factors)), Hadamard.random(SIZE)))


def _scaled(base: Quantized, factors: LowRank) -> Expression:
    return Product((Sum((base, factors)), Diagonal(torch.linspace(0.5, 2, SIZE))))


def _act_order(base: Quantized, factors: LowRank) -> Expression:
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    return Sum((Product((base, Permutation.of(order))), factors))


def _build(form: Callable[[Quantized, LowRank], Expression], tokens: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    operator = form(*_middle(generator))
    x = torch.randn(tokens, SIZE, generator=generator)
    modules = {name: FactoredLinear(operator, backend=name) for name in ("composed", "einsum")}
    return beside_dense(operator, x, modules, repeats=9)


_FORMS = {"rotated": _rotated, "two-sided": _two_sided, "scaled": _scaled, "act-order": _act_order}
for _name, _form in _FORMS.items():
    for _tokens in (1, 4, 256):
        case(f"composed-{_name}-{_tokens}", f"4096×4096 int4 group 128 + rank 64, {_name}, {_tokens} tokens, float32")(
            partial(_build, _form, _tokens)
        )
