"""q, k, v of one input on CPU: each by itself, and what they have in common once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cases.layers import ERROR, LIMIT, integers, off
from benchmarks.registry import Problem, case
from tnc import FactoredLinear, Hadamard, LowRank, Product, Sum
from tnc.siblings import join_siblings
from tnc.terms import Expression, dense64
from tnc.ties import share_tensors

COLUMNS, RANK, ROWS = 4096, 64, {"q": 4096, "k": 1024, "v": 1024}


class Block(nn.Module):
    """Layers that are called one by one with one input."""

    def __init__(self, operators: dict[str, Expression], joined: bool) -> None:
        super().__init__()
        for name, operator in operators.items():
            self.add_module(name, FactoredLinear(operator))
        share_tensors(list(self.children()), list(operators.values()))  # type: ignore[arg-type]
        if joined:
            join_siblings(self, [list(operators)])

    def forward(self, x: Tensor) -> Tensor:
        """The outputs side by side."""
        with torch.no_grad():
            return torch.cat([layer(x) for layer in self.children()], -1)


def _operators(rotated: bool, generator: torch.Generator) -> dict[str, Expression]:
    right = torch.randn(RANK, COLUMNS, generator=generator) / COLUMNS**0.5
    found: dict[str, Expression] = {}
    for name, rows in ROWS.items():
        base = integers(rows, COLUMNS, 4, generator)
        both = Sum((base, LowRank(torch.randn(rows, RANK, generator=generator) / COLUMNS**0.5, right)))
        found[name] = Product((both, Hadamard.random(COLUMNS))) if rotated else both
    return found


def _build(rotated: bool, tokens: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    operators = _operators(rotated, generator)
    exact = torch.cat([dense64(operator) for operator in operators.values()])
    x = torch.randn(tokens, COLUMNS, generator=generator)
    expected, dense = x.double() @ exact.T, exact.float()
    apart, joined = Block(operators, joined=False), Block(operators, joined=True)
    return Problem(
        ways={"dense, one product": lambda: nn.functional.linear(x, dense), "apart": lambda: apart(x),
              "siblings": lambda: joined(x)},
        errors=lambda y: {ERROR: off(y, expected)},
        limit=LIMIT,
        repeats=25,
    )  # fmt: skip


for _rotated in (False, True):
    for _tokens in (1, 4):
        _name = "rotated" if _rotated else "plain"
        case(
            f"siblings-{_name}-{_tokens}", f"4096 → 4096, 1024, 1024 int4 + rank 64, one R, {_name}, {_tokens} tokens"
        )(lambda rotated=_rotated, tokens=_tokens: _build(rotated, tokens))
