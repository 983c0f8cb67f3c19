"""Times of a mixture's experts on this GPU: one launch, a launch an expert, and dense; answers checked first.

A row is captured ``R`` times in one CUDA graph over ``R`` weight sets with a routing of their own, together 300 MB of
chosen experts, L2 flushed before each of 15 replays; the time is the median over R. The ways that run an expert at a
time, and torch's grouped product, get x already gathered and their loop bounds from the host.

python -m benchmarks.gpu_moe [--out results/gpu_moe.json] [--only 128x8x768x2048]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_clock import cold_microseconds, gpu, nan_filled, replayed
from benchmarks.results import write
from tnc.kernels import experts as row
from tnc.kernels.experts_launch import Stacked
from tnc.kernels.qlr_ops import dense, run
from tnc.kernels.words import group_words, unit_of

BRAIN = torch.bfloat16
SHAPES = ((128, 8, 768, 2048), (64, 8, 1408, 2048), (8, 2, 1408, 2048), (8, 2, 14336, 4096))
TOKENS = (1, 16, 256)
TOTAL = 300e6  # bytes of the chosen experts of all sets


@dataclass
class Set:
    """Weights of all experts and one routing of ``x`` (tokens, in_features)."""

    stacked: Stacked
    weights: Tensor  # (experts, out_features, in_features), dense, not of the same values
    x: Tensor
    index: Tensor  # (tokens, k)
    order: Tensor  # of pairs by expert
    routing: tuple[Tensor, Tensor]
    ends: Tensor  # (experts,) int32, positions in ``order``
    parts: list[tuple[int, Tensor]]  # expert and its rows of x, for experts with pairs

    @property
    def gathered(self) -> Tensor:
        """Rows of x in the order of the experts."""
        return torch.cat([part for _, part in self.parts])


def stacked(experts: int, rows: int, columns: int, *, bits: int = 4, rank: int = 64) -> Stacked:
    """Random codes, scales and factors, group 128."""
    shape = (experts, columns // unit_of(bits), rows, 16)
    low = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
    scale = (torch.rand(experts * rows, columns // 128, device="cuda") / 2**bits / 40 + 1e-4).to(BRAIN)
    words = group_words(scale, torch.randint(0, 2**bits, scale.shape, device="cuda"))  # (groups, experts rows)
    groups = words.unflatten(1, (experts, rows)).transpose(0, 1).contiguous()
    left, right = (0.05 * torch.randn(experts * size * rank, device="cuda") for size in (rows, columns))
    firsts = torch.arange(experts + 1, dtype=torch.int32, device="cuda") * rank
    ranks = (rank,) * experts
    return Stacked(low, low, groups, left.to(BRAIN), right.to(BRAIN), firsts, None, ranks, columns, bits, 128, "brain")


def routed(weights: tuple[Stacked, Tensor], tokens: int, top: int) -> Set:
    """A random choice of ``top`` experts a token."""
    held, plain = weights
    experts = len(held.ranks)
    x = torch.randn(tokens, held.columns, device="cuda").to(BRAIN)
    index = torch.rand(tokens, experts, device="cuda").topk(top).indices
    order = torch.argsort(index.flatten(), stable=True)
    ends = torch.bincount(index.flatten(), minlength=experts).cumsum(0).to(torch.int32)
    sorted_x = x[order // top]
    bounds = [0, *ends.tolist()]
    parts = [(e, sorted_x[a:b].contiguous()) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]
    return Set(held, plain, x, index, order, row.route(index.flatten(), experts), ends, parts)


def one_launch(s: Set) -> Tensor:
    """All pairs by ``tnc::experts``, in the order of pairs."""
    w = s.stacked
    y: Tensor = row.experts(s.x, s.index.flatten(), *s.routing, w.low, w.high, w.groups, w.left, w.right,
                            w.firsts, w.gain, w.ranks, w.bits, w.group, w.scale, w.table)  # fmt: skip
    return y


def in_turn(s: Set) -> list[Tensor]:
    """A ``qlr`` launch an expert, in the order of experts."""
    return [run(part, s.stacked.member(expert)) for expert, part in s.parts]


def dense_in_turn(s: Set) -> list[Tensor]:
    """A dense product an expert."""
    return [linear(part, s.weights[expert]) for expert, part in s.parts]


def ways() -> dict[str, tuple[Callable[[Set], Any], bool]]:
    """What is timed, and whether it runs the quantized weights."""
    gathered: dict[int, Tensor] = {}

    def grouped_dense(s: Set) -> Tensor:
        x = gathered.setdefault(id(s), s.gathered)
        return torch._grouped_mm(x, s.weights.mT, offs=s.ends)

    found: dict[str, tuple[Callable[[Set], Any], bool]] = {
        "one launch": (one_launch, True), "qlr an expert": (in_turn, True), "dense an expert": (dense_in_turn, False),
    }  # fmt: skip
    if hasattr(torch, "_grouped_mm"):
        found["torch._grouped_mm, dense"] = (grouped_dense, False)
    return found


def error(s: Set, result: Tensor | list[Tensor], quantized: bool) -> float:
    """Relative error against float64, pair by pair in the order of experts."""
    found = torch.cat(result) if isinstance(result, list) else result
    if quantized and not isinstance(result, list):
        found = found[s.order]
    exact = torch.cat([
        part.double() @ (dense(s.stacked.member(e), torch.float64) if quantized else s.weights[e].double()).T
        for e, part in s.parts
    ])  # fmt: skip
    return float((found.double() - exact).norm() / exact.norm())


def measured(shape: tuple[int, int, int, int], tokens: int) -> list[dict[str, Any]]:
    """Every way for one shape and number of tokens, and the routing by itself."""
    experts, top, rows, columns = shape
    active = experts * (1 - (1 - top / experts) ** tokens)
    pool = 3 if experts * rows * columns < 3e8 else 2
    weights = []
    for _ in range(pool):
        plain = torch.empty(experts, rows, columns, device="cuda", dtype=BRAIN).normal_(std=0.02)
        weights.append((stacked(experts, rows, columns), plain))
    found = []
    for name, (way, quantized) in ways().items():
        size = active * rows * columns * (0.53 if quantized else 2)
        sets = [routed(weights[i % pool], tokens, top) for i in range(max(3, min(48, int(TOTAL / size))))]
        with nan_filled():
            wrong = error(sets[0], way(sets[0]), quantized)
        time = cold_microseconds([partial(way, s) for s in sets]) if wrong < 1e-2 else None
        found.append({"way": name, "error": wrong, "us": time})
        if name == "one launch" and not row.run_apart(tokens * top, experts):
            flat = [s.index.flatten() for s in sets]
            time, _ = replayed(lambda flat=flat: [row.route(i, experts) for i in flat], repeats=15)
            found.append({"way": "route", "error": 0.0, "us": time * 1e3 / len(sets)})
    label = f"{experts} experts, top {top}, {columns}->{rows}"
    for each in found:
        shown = "no time: wrong" if each["us"] is None else f"{each['us']:9.2f} us"
        print(f"{label:<40}{tokens:>5}  {each['way']:<28}{shown}  error {each['error']:.1e}", flush=True)
    return [{"shape": label, "tokens": tokens, **each} for each in found]


def main() -> None:
    """Run, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu_moe.json"))
    parser.add_argument("--only", choices=["x".join(map(str, shape)) for shape in SHAPES])
    arguments = parser.parse_args()
    machine = gpu()
    print(json.dumps(machine))
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        if arguments.only in (None, "x".join(map(str, shape))):
            for tokens in TOKENS:
                rows += measured(shape, tokens)
                write(arguments.out, {"machine": machine, "rows": rows})
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
