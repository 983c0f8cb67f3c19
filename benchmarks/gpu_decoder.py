"""A decoder of 7B shape at batch 1, everything in one CUDA graph: dense, unfused and fused int4 + rank 64.

32 blocks, hidden 4096, 32 heads, 11008 features between, 128 tokens in the cache; random weights. The three share
every operation but the linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu_clock import replayed
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import dense, run
from tnc.kernels.words import group_words

BRAIN = torch.bfloat16
BLOCKS, HIDDEN, HEADS, BETWEEN, CACHE = 32, 4096, 32, 11008, 128
LAYERS = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN),
          "gate": (BETWEEN, HIDDEN), "up": (BETWEEN, HIDDEN), "down": (HIDDEN, BETWEEN)}  # fmt: skip
Apply = Callable[[Any, Tensor], Tensor]


def forward(x: Tensor, blocks: list[dict[str, Any]], cache: list[tuple[Tensor, Tensor]], apply: Apply) -> Tensor:
    """One token (1, hidden) through every block."""
    for block, (keys, values) in zip(blocks, cache, strict=True):
        h = rms_norm(x, (HIDDEN,))
        q, k, v = (apply(block[name], h).view(1, HEADS, 1, -1) for name in ("q", "k", "v"))
        keys[:, :, -1:].copy_(k)
        values[:, :, -1:].copy_(v)
        x = x + apply(block["o"], scaled_dot_product_attention(q, keys, values).reshape(1, HIDDEN))
        h = rms_norm(x, (HIDDEN,))
        x = x + apply(block["down"], silu(apply(block["gate"], h)) * apply(block["up"], h))
    return x


def _weight(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns, device="cuda") * columns**-0.5).to(BRAIN)


def _packed(rows: int, columns: int) -> Packed:
    low = torch.randint(-(2**31), 2**31 - 1, (columns // 128, rows, 16), dtype=torch.int32, device="cuda")
    scale = torch.full((rows, columns // 128), columns**-0.5 / 5, device="cuda").to(BRAIN)
    groups = group_words(scale, torch.full_like(scale, 8, dtype=torch.int64))
    left = (torch.randn(rows, 64, device="cuda") / 64).to(BRAIN)
    return Packed(low, low, groups, left, _weight(64, columns), 4, 128, "brain")


def _tinygemm(rows: int, columns: int) -> tuple[Tensor, ...]:
    codes = torch.randint(0, 256, (rows, columns // 2), device="cuda", dtype=torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    both = torch.zeros(columns // 128, rows, 2, device="cuda", dtype=BRAIN)
    both[..., 0] = columns**-0.5 / 5
    return words, both, (torch.randn(rows, 64, device="cuda") / 64).to(BRAIN), _weight(64, columns)


def _unfused(layer: tuple[Tensor, ...], x: Tensor) -> Tensor:
    y = torch.ops.aten._weight_int4pack_mm(x, layer[0], 128, layer[1])
    return torch.addmm(y, linear(x, layer[3]), layer[2].T)


def _milliseconds(blocks: list[dict[str, Any]], apply: Apply) -> float:
    x = _weight(1, HIDDEN) * HIDDEN**0.5
    shape = (1, HEADS, CACHE, HIDDEN // HEADS)
    cache = [(torch.randn(shape, device="cuda").to(BRAIN), torch.randn(shape, device="cuda").to(BRAIN)) for _ in blocks]
    with torch.no_grad():
        time, y = replayed(lambda: forward(x, blocks, cache, apply), repeats=20)
    assert y.isfinite().all()
    return time


def _check() -> float:
    """Two blocks of packed layers against the same layers as dense float32 matrices."""
    blocks = [{name: _packed(*shape) for name, shape in LAYERS.items()} for _ in range(2)]
    x = _weight(1, HIDDEN) * HIDDEN**0.5
    shape = (1, HEADS, CACHE, HIDDEN // HEADS)
    cache = [(torch.randn(shape, device="cuda").to(BRAIN), torch.randn(shape, device="cuda").to(BRAIN)) for _ in blocks]
    y = forward(x, blocks, cache, lambda layer, h: run(h, layer)).double()
    wide = [{name: dense(layer, torch.float32) for name, layer in block.items()} for block in blocks]
    exact = forward(x.float(), wide, [(k.float(), v.float()) for k, v in cache], lambda w, h: linear(h, w)).double()
    return float((y - exact).norm() / exact.norm())


def decoders() -> list[dict[str, Any]]:
    """Tokens a second of the three decoders."""
    wrong = _check()
    ways: dict[str, tuple[Callable[..., Any], Apply]] = {
        "dense bf16": (_weight, lambda layer, h: linear(h, layer)),
        "unfused: tinygemm int4 + rank 64": (_tinygemm, _unfused),
        "int4 g128 + rank 64": (_packed, lambda layer, h: run(h, layer)),
    }
    rows = []
    for name, (make, apply) in ways.items():
        blocks = [{layer: make(*shape) for layer, shape in LAYERS.items()} for _ in range(BLOCKS)]
        milliseconds = _milliseconds(blocks, apply) if wrong < 3e-2 else None
        rate = None if milliseconds is None else 1e3 / milliseconds
        rows.append({"decoder": name, "ms": milliseconds, "tokens_per_second": rate, "error": wrong})
        del blocks
        torch.cuda.empty_cache()
    return rows
