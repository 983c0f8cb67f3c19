"""Rotating a batch: the fast Hadamard transform against multiplication by the dense rotation."""

from __future__ import annotations

import torch

from benchmarks.registry import Problem, case
from tnc.terms import Hadamard


def _build(size: int, tokens: int) -> Problem:
    rotation = Hadamard.random(size)
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0))
    dense = rotation.to_dense().float()
    expected = rotation.linear(x.double())
    return Problem(
        ways={
            "dense multiplication": lambda: torch.nn.functional.linear(x, dense),
            "Hadamard term": lambda: rotation.linear(x),
        },
        errors=lambda y: {"relative error": float((y - expected).norm() / expected.norm())},
        limit={"relative error": 1e-5},
        repeats=9,
    )


@case("hadamard-4096-1", "4096 = 2^12, 1 token, float32")
def hadamard_4096_1() -> Problem:
    """Decode, a power of two."""
    return _build(4096, 1)


@case("hadamard-11008-1", "11008 = 64 x 172 (Williamson), 1 token, float32")
def hadamard_11008_1() -> Problem:
    """Decode, Llama-2-7B's MLP width."""
    return _build(11008, 1)


@case("hadamard-11008-256", "11008 = 64 x 172 (Williamson), 256 tokens, float32")
def hadamard_11008_256() -> Problem:
    """Prefill."""
    return _build(11008, 256)
