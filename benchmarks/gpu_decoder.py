"""A decoder of 7B shape at batch 1, everything in one CUDA graph: dense, unfused, and fused int4 + rank 64.

32 blocks, hidden 4096, 32 heads, 11008 features between, 128 tokens in the cache, random weights: norms, rotary
positions, cache, attention and gates as models have them, without embedding and head. Contenders share all of that
(`benchmarks.gpu_glue`, compiled by torch and written by hand) and differ in the linear layers alone. Layers of one
input are q, k, v and gate, up: "joined" contenders take them as one product or launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_clock import replayed
from benchmarks.gpu_glue import BY_HAND, PLAIN, Glue, compiled
from tnc.kernels.launch import counters
from tnc.kernels.qlr_launch import Packed, vector
from tnc.kernels.qlr_ops import dense, run
from tnc.kernels.words import group_words

BRAIN = torch.bfloat16
BLOCKS, HIDDEN, HEADS, BETWEEN, CACHE = 32, 4096, 32, 11008, 128
RANK, GROUP = 64, 128
STAGES = {"qkv": 3 * [(HIDDEN, HIDDEN)], "o": [(HIDDEN, HIDDEN)], "gate_up": 2 * [(BETWEEN, HIDDEN)],
          "down": [(HIDDEN, BETWEEN)]}  # fmt: skip
"""(out_features, in_features) of the layers of one input."""
Apply = Callable[[Any, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Way:
    """How the linear layers run.

    Attributes:
        make: one layer (out_features, in_features).
        join: layers of one input to what ``apply`` takes.
        apply: its answers to one input (1, in_features).
    """

    make: Callable[[int, int], Any]
    join: Callable[[Sequence[Any]], Any]
    apply: Apply


@dataclass(frozen=True)
class Rest:
    """What every contender has: weights of norms (blocks, 2, hidden), caches, turns of the position."""

    norms: Tensor
    cache: tuple[tuple[Tensor, Tensor], ...]
    turn: Tensor


def forward(x: Tensor, blocks: Sequence[dict[str, Any]], rest: Rest, apply: Apply, glue: Glue) -> Tensor:
    """One token (1, hidden) through every block."""
    y: Tensor | None = None
    for block, (first, second), (keys, values) in zip(blocks, rest.norms, rest.cache, strict=True):
        x, h = glue.normed(x, y, first)
        q, k, v = apply(block["qkv"], h)
        (y,) = apply(block["o"], glue.attended(q, k, v, keys, values, rest.turn))
        x, h = glue.normed(x, y, second)
        gate, up = apply(block["gate_up"], h)
        (y,) = apply(block["down"], glue.gated(gate, up))
    assert y is not None, "there are blocks"
    return x + y


def _weight(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns, device="cuda") * columns**-0.5).to(BRAIN)


def _packed(rows: int, columns: int) -> Packed:
    low = torch.randint(-(2**31), 2**31 - 1, (columns // 128, rows, 16), dtype=torch.int32, device="cuda")
    scale = torch.full((rows, columns // GROUP), columns**-0.5 / 5, device="cuda").to(BRAIN)
    groups = group_words(scale, torch.full_like(scale, 8, dtype=torch.int64))
    left = (torch.randn(rows, RANK, device="cuda") / RANK).to(BRAIN)
    return Packed(low, low, groups, left, _weight(RANK, columns), 4, GROUP, "brain")


def _tinygemm(rows: int, columns: int) -> tuple[Tensor, ...]:
    codes = torch.randint(0, 256, (rows, columns // 2), device="cuda", dtype=torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    both = torch.zeros(columns // GROUP, rows, 2, device="cuda", dtype=BRAIN)
    both[..., 0] = columns**-0.5 / 5
    return words, both, (torch.randn(rows, RANK, device="cuda") / RANK).to(BRAIN), _weight(RANK, columns)


def _each(call: Callable[[Any, Tensor], Tensor]) -> Apply:
    """A launch (or more) for each layer."""
    return lambda layers, h: [call(layer, h) for layer in layers]


def _unfused(layer: tuple[Tensor, ...], h: Tensor) -> Tensor:
    words, both, left, right = layer
    return torch.addmm(torch.ops.aten._weight_int4pack_mm(h, words, GROUP, both), linear(h, right), left.T)


def _stacked(layers: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Layers of equal shape as one int4 product, one R, and a batch of L."""
    words, both, lefts, rights = zip(*layers, strict=True)
    return torch.cat(words), torch.cat(both, 1), torch.stack(lefts).mT.contiguous(), torch.cat(rights)


def _unfused_together(layers: tuple[Tensor, ...], h: Tensor) -> Sequence[Tensor]:
    """Three launches for the layers of one input."""
    words, both, lefts, right = layers
    y = torch.ops.aten._weight_int4pack_mm(h, words, GROUP, both).view(len(lefts), 1, -1)
    return torch.baddbmm(y, linear(h, right).view(len(lefts), 1, -1), lefts).unbind()


def _dense_together(layers: tuple[Tensor, int], h: Tensor) -> Sequence[Tensor]:
    weight, count = layers
    return linear(h, weight).chunk(count, 1)


def _together(layers: Sequence[Packed], h: Tensor) -> Sequence[Tensor]:
    """One launch for the layers of one input."""
    return vector(h, *layers).split([layer.shape[0] for layer in layers], 1)


def _one_right(layers: Sequence[Packed]) -> list[Packed]:
    return [replace(layer, right=layers[0].right) for layer in layers]


def _without(layers: Sequence[Packed], h: Tensor) -> Sequence[Tensor]:
    """No layer at all: numbers of the right shape."""
    return [layer.left.view(1, -1)[:, : layer.shape[0]] for layer in layers]


_WAYS = {
    "dense bf16": Way(_weight, list, _each(lambda w, h: linear(h, w))),
    "dense bf16, joined": Way(_weight, lambda each: (torch.cat(list(each)), len(each)), _dense_together),
    "unfused: tinygemm int4 + rank 64": Way(_tinygemm, list, _each(_unfused)),
    "unfused, joined": Way(_tinygemm, _stacked, _unfused_together),
    "int4 g128 + rank 64": Way(_packed, list, _each(lambda layer, h: run(h, layer))),
    "int4 g128 + rank 64, joined": Way(_packed, list, _together),
    "int4 g128 + rank 64, joined, one R": Way(_packed, _one_right, _together),
    "everything but the linear layers": Way(_packed, list, _without),
}


def _rest(blocks: int, dtype: torch.dtype = BRAIN) -> Rest:
    generator = torch.Generator("cuda").manual_seed(1)
    draw = partial(torch.randn, device="cuda", generator=generator)
    shape = (HEADS, CACHE, HIDDEN // HEADS)
    angles = (CACHE - 1) * 1e4 ** (-torch.arange(0, 1, 2 * HEADS / HIDDEN, device="cuda", dtype=torch.float64))
    turn = torch.stack([angles.cos(), angles.sin()]).repeat(1, 2).float()
    norms = (1 + draw(blocks, 2, HIDDEN) / 10).to(dtype)
    return Rest(norms, tuple((draw(shape).to(dtype), draw(shape).to(dtype)) for _ in range(blocks)), turn)


def _input() -> Tensor:
    return torch.randn(1, HIDDEN, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(BRAIN)


@torch.no_grad()
def error(way: Way, glue: Glue) -> float:
    """Relative error of two blocks against the same layers as float32 matrices, glue by torch in float32.

    Always of the same draw: in a few (2 of 30) the attention of the second block is so sharp that 0.7 % of error in q
    and k becomes 5 %, with every glue alike.
    """
    torch.manual_seed(0)
    blocks = [{name: [way.make(*s) for s in shapes] for name, shapes in STAGES.items()} for _ in range(2)]
    if way.join is _one_right:
        blocks = [{name: _one_right(layers) for name, layers in block.items()} for block in blocks]
    wide = [{name: [_matrix(each) for each in layers] for name, layers in block.items()} for block in blocks]
    joined = [{name: way.join(layers) for name, layers in block.items()} for block in blocks]
    found, exact = _rest(2), _rest(2, torch.float32)
    exact = replace(exact, norms=found.norms.float(), cache=tuple((k.float(), v.float()) for k, v in found.cache))
    y = forward(_input(), joined, found, way.apply, glue).double()
    plain = _each(lambda w, h: linear(h, w))
    other = forward(_input().float(), wide, exact, plain, PLAIN).double()
    return float((y - other).norm() / other.norm())


def _matrix(layer: Any) -> Tensor:  # noqa: ANN401
    """A layer as a float32 matrix."""
    if isinstance(layer, Packed):
        return dense(layer, torch.float32)
    if isinstance(layer, Tensor):
        return layer.float()
    words, both, left, right = layer
    eye = torch.eye(right.shape[1], device="cuda", dtype=BRAIN)
    units = torch.stack([torch.ones_like(both[..., 0]), torch.zeros_like(both[..., 0])], -1)
    codes = torch.ops.aten._weight_int4pack_mm(eye, words, GROUP, units).T  # code - 8, exact
    scale = both[..., 0].float().T.repeat_interleave(GROUP, 1)
    return codes.float() * scale + left.float() @ right.float()


def _milliseconds(call: Callable[[], Tensor]) -> float:
    counters.cache_clear()  # an arena of counters for each graph: those of earlier graphs are gone
    with torch.no_grad():
        time, y = replayed(call, repeats=20)
    assert y.isfinite().all()
    return time


def _alone(blocks: Sequence[dict[str, Any]], apply: Apply, hidden: Tensor, between: Tensor) -> Tensor:
    """The linear layers one after another, none waiting for what only glue would make of another."""
    for block in blocks:
        for name, layers in block.items():
            *_, y = apply(layers, between if name == "down" else hidden)
    return y


def decoders() -> Iterator[dict[str, Any]]:
    """Tokens a second of every contender with every glue, and of the linear layers by themselves."""
    glues = {"by hand": BY_HAND, "torch.compile": compiled(), "torch": PLAIN}
    for name, way in _WAYS.items():
        wrong = {label: error(way, glue) for label, glue in glues.items()} if way.apply is not _without else {}
        blocks = [
            {stage: way.join([way.make(*shape) for shape in shapes]) for stage, shapes in STAGES.items()}
            for _ in range(BLOCKS)
        ]
        rest, x = _rest(BLOCKS), _input()
        for label, glue in glues.items():
            off = wrong.get(label)
            fine = off is None or off < 1e-2
            call = partial(forward, x, blocks, rest, way.apply, glue)
            yield {"decoder": name, "glue": label, "error": off, **_rated(_milliseconds(call) if fine else None)}
        if way.apply is not _without:
            call = partial(_alone, blocks, way.apply, x, _weight(1, BETWEEN))
            yield {
                "decoder": name,
                "glue": "none: the linear layers alone",
                "error": None,
                **_rated(_milliseconds(call)),
            }
        del blocks
        torch.cuda.empty_cache()


def _rated(milliseconds: float | None) -> dict[str, float | None]:
    return {"ms": milliseconds, "tokens_per_second": None if milliseconds is None else 1e3 / milliseconds}
