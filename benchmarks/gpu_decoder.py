"""A decoder of 7B shape at batch 1, everything in one CUDA graph: dense, unfused, fused int4 + rank 64, and siblings.

32 blocks, hidden 4096, 32 heads, 11008 features between, 128 tokens in the cache; random weights. The decoders share
every operation but the linear layers. Siblings are q, k, v and gate, up: layers of one input in one launch, with a
right factor each, or one right factor in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu_clock import replayed
from tnc.kernels.qlr_launch import Packed, vector
from tnc.kernels.qlr_ops import dense, run
from tnc.kernels.words import group_words

BRAIN = torch.bfloat16
BLOCKS, HIDDEN, HEADS, BETWEEN, CACHE = 32, 4096, 32, 11008, 128
LAYERS = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN),
          "gate": (BETWEEN, HIDDEN), "up": (BETWEEN, HIDDEN), "down": (HIDDEN, BETWEEN)}  # fmt: skip
Apply = Callable[[Sequence[Any], Tensor], Sequence[Tensor]]  # layers of one input, and the input


def forward(x: Tensor, blocks: list[dict[str, Any]], cache: list[tuple[Tensor, Tensor]], apply: Apply) -> Tensor:
    """One token (1, hidden) through every block."""
    for block, (keys, values) in zip(blocks, cache, strict=True):
        h = rms_norm(x, (HIDDEN,))
        q, k, v = (y.view(1, HEADS, 1, -1) for y in apply([block[name] for name in ("q", "k", "v")], h))
        keys[:, :, -1:].copy_(k)
        values[:, :, -1:].copy_(v)
        (y,) = apply([block["o"]], scaled_dot_product_attention(q, keys, values).reshape(1, HIDDEN))
        x = x + y
        gate, up = apply([block["gate"], block["up"]], rms_norm(x, (HIDDEN,)))
        (y,) = apply([block["down"]], silu(gate) * up)
        x = x + y
    return x


def one_by_one(call: Callable[[Any, Tensor], Tensor]) -> Apply:
    """A launch (or more) for each layer."""
    return lambda layers, h: [call(layer, h) for layer in layers]


def together(layers: Sequence[Packed], h: Tensor) -> Sequence[Tensor]:
    """One launch for the layers of one input."""
    return vector(h, *layers).split([layer.shape[0] for layer in layers], 1)


def without(layers: Sequence[Packed], h: Tensor) -> Sequence[Tensor]:
    """No layer at all: numbers of the right shape, for the time of everything else."""
    return [layer.left.view(1, -1)[:, : layer.shape[0]] for layer in layers]


def shared_right(block: dict[str, Packed]) -> dict[str, Packed]:
    """The block with one right factor for q, k, v and one for gate, up."""
    owners = {"k": "q", "v": "q", "up": "gate"}
    return {name: replace(layer, right=block[owners.get(name, name)].right) for name, layer in block.items()}


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
    """Two blocks of packed layers, with and without siblings, against the same layers as dense float32 matrices."""
    blocks = [shared_right({name: _packed(*shape) for name, shape in LAYERS.items()}) for _ in range(2)]
    x = _weight(1, HIDDEN) * HIDDEN**0.5
    shape = (1, HEADS, CACHE, HIDDEN // HEADS)
    cache = [(torch.randn(shape, device="cuda").to(BRAIN), torch.randn(shape, device="cuda").to(BRAIN)) for _ in blocks]
    ways = (one_by_one(lambda layer, h: run(h, layer)), together)
    found = [forward(x, blocks, cache, way).double() for way in ways]
    wide = [{name: dense(layer, torch.float32) for name, layer in block.items()} for block in blocks]
    plain = one_by_one(lambda w, h: linear(h, w))
    exact = forward(x.float(), wide, [(k.float(), v.float()) for k, v in cache], plain).double()
    return max(float((y - exact).norm() / exact.norm()) for y in found)


def decoders() -> list[dict[str, Any]]:
    """Tokens a second of the decoders."""
    wrong = _check()
    fused = one_by_one(lambda layer, h: run(h, layer))
    ways: dict[str, tuple[Callable[..., Any], Callable[..., Any], Apply]] = {
        "dense bf16": (_weight, dict, one_by_one(lambda layer, h: linear(h, layer))),
        "unfused: tinygemm int4 + rank 64": (_tinygemm, dict, one_by_one(_unfused)),
        "int4 g128 + rank 64": (_packed, dict, fused),
        "the same, siblings in one launch": (_packed, dict, together),
        "siblings with one right factor": (_packed, shared_right, together),
        "everything but the linear layers": (_packed, dict, without),
    }
    rows = []
    for name, (make, share, apply) in ways.items():
        blocks = [share({layer: make(*shape) for layer, shape in LAYERS.items()}) for _ in range(BLOCKS)]
        milliseconds = _milliseconds(blocks, apply) if wrong < 3e-2 else None
        rate = None if milliseconds is None else 1e3 / milliseconds
        rows.append({"decoder": name, "ms": milliseconds, "tokens_per_second": rate, "error": wrong})
        del blocks
        torch.cuda.empty_cache()
    return rows
