"""What stands between the linear layers of a decoder at one token: by torch, by ``torch.compile``, and by hand.

All take and give the same; contenders of `benchmarks.gpu_decoder` share them. Those by hand are one launch each, begin
while the kernel before them ends and let the next begin, as the kernels of `tnc` do (programmatic dependent launch).
"""

# ruff: noqa: ANN001, ANN201 -- device code, which Triton reads in its own way

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tnc.kernels.launch import early, overlaps

EPS = 1e-5


@dataclass(frozen=True)
class Glue:
    """The pieces of a block.

    Attributes:
        normed: (x, y or ``None``, weight) to x + y and its RMS norm, each (1, hidden).
        attended: (q, k, v, keys, values, turn) to (1, hidden): q and k (1, hidden) turned by ``turn`` (2, head) of
            cosines and sines, k and v put at the end of the cache (heads, tokens, head), attention over all of it.
        gated: (gate, up) to ``silu(gate) up``.
    """

    normed: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
    attended: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Heads (heads, head) turned by a position's cosines and sines (2, head), in float32, rounded once."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * turn[0] + torch.cat([-second, first], -1) * turn[1]).to(x.dtype)


def _normed(x: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x if y is None else x + y
    return x, rms_norm(x, weight.shape, weight, EPS)


def _attended(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, turn: Tensor) -> Tensor:
    heads, _, head = keys.shape
    keys[:, -1].copy_(turned(k.view(heads, head), turn))
    values[:, -1].copy_(v.view(heads, head))
    query = turned(q.view(heads, head), turn).view(1, heads, 1, head)
    return scaled_dot_product_attention(query, keys.unsqueeze(0), values.unsqueeze(0)).reshape(1, heads * head)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


PLAIN = Glue(_normed, _attended, _gated)


def compiled() -> Glue:
    """`PLAIN` through ``torch.compile``."""
    return Glue(*(torch.compile(each, fullgraph=True) for each in (_normed, _attended, _gated)))


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """The next kernel may load what no kernel writes, such as weights; before anything else it waits for this one."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(PDL: tl.constexpr):
    """From here on what earlier kernels wrote may be read."""
    if PDL:
        gdc_wait()


@triton.jit
def normed_kernel(x, y, weight, total, h, N: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, EPSILON,
                  PDL: tl.constexpr):  # fmt: skip
    """One row: ``total = x + y`` and ``h``, its RMS norm times the weight."""
    let_next_begin(PDL)
    i = tl.arange(0, BLOCK)
    w = tl.load(weight + i, mask=i < N, other=0.0)
    wait_for_last(PDL)
    value = tl.load(x + i, mask=i < N, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(y + i, mask=i < N, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + i, value, mask=i < N)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / N + EPSILON)
    tl.store(h + i, (wide * scale * w.to(tl.float32)).to(value.dtype), mask=i < N)


@triton.jit
def attended_kernel(q, k, v, keys, values, turn, y, scale, TOKENS: tl.constexpr, HEAD: tl.constexpr,
                    BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One head; the cache is on its way before q is there, since only its last place belongs to this token."""
    let_next_begin(PDL)
    head = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    d = tl.arange(0, HEAD)
    place = head * TOKENS * HEAD + c[:, None] * HEAD + d[None, :]
    before = (c < TOKENS - 1)[:, None]
    old_keys = tl.load(keys + place, mask=before, other=0.0)
    old_values = tl.load(values + place, mask=before, other=0.0)
    cosine = tl.load(turn + d)
    sine = tl.load(turn + HEAD + d) * tl.where(d < HEAD // 2, -1.0, 1.0)
    own = head * HEAD + d
    other = head * HEAD + (d + HEAD // 2) % HEAD
    wait_for_last(PDL)
    kind: tl.constexpr = q.dtype.element_ty
    query = tl.load(q + own).to(tl.float32) * cosine + tl.load(q + other).to(tl.float32) * sine
    key = (tl.load(k + own).to(tl.float32) * cosine + tl.load(k + other).to(tl.float32) * sine).to(kind)
    value = tl.load(v + own)
    last = head * TOKENS * HEAD + (TOKENS - 1) * HEAD + d
    tl.store(keys + last, key)
    tl.store(values + last, value)
    query = query.to(kind).to(tl.float32) * scale
    scores = tl.sum(old_keys.to(tl.float32) * query[None, :], 1)
    scores = tl.where(c < TOKENS - 1, scores, float("-inf"))
    mine = tl.sum(key.to(tl.float32) * query, 0)
    most = tl.maximum(tl.max(scores, 0), mine)
    weights = tl.exp(scores - most)
    own_weight = tl.exp(mine - most)
    found = tl.sum(weights[:, None] * old_values.to(tl.float32), 0) + own_weight * value.to(tl.float32)
    tl.store(y + own, (found / (tl.sum(weights, 0) + own_weight)).to(kind))


@triton.jit
def gated_kernel(gate, up, y, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """``silu(gate) up``."""
    let_next_begin(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_last(PDL)
    g = tl.load(gate + i, mask=i < N, other=0.0)
    u = tl.load(up + i, mask=i < N, other=0.0)
    wide = g.to(tl.float32)
    smooth = (wide / (1 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
    tl.store(y + i, (smooth * u.to(tl.float32)).to(g.dtype), mask=i < N)


def _options(x: Tensor, warps: int) -> dict[str, Any]:
    pdl = overlaps(x.device)
    return {"PDL": pdl, "num_warps": warps, **early(pdl)}


def _normed_by_hand(x: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total, h = x if y is None else torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    held = x if y is None else y
    normed_kernel[(1,)](x, held, weight, total, h, size, triton.next_power_of_2(size), y is not None, EPS,
                        **_options(x, 8))  # fmt: skip
    return total, h


def _attended_by_hand(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, turn: Tensor) -> Tensor:
    heads, tokens, head = keys.shape
    y = q.new_empty(1, heads * head)
    attended_kernel[(heads,)](q, k, v, keys, values, turn, y, head**-0.5, tokens, head,
                              triton.next_power_of_2(tokens), **_options(q, 8))  # fmt: skip
    return y


def _gated_by_hand(gate: Tensor, up: Tensor) -> Tensor:
    y, size = torch.empty_like(gate), gate.numel()
    gated_kernel[(triton.cdiv(size, 512),)](gate, up, y, size, 512, **_options(gate, 4))
    return y


BY_HAND = Glue(_normed_by_hand, _attended_by_hand, _gated_by_hand)
