"""Times of rotated, scaled and reordered inputs in the launch of Q + L R, beside a launch of their own.

int4, group 128, rank 64, bfloat16; cold weights, CUDA graphs, each answer checked first, as in `benchmarks.gpu`.

A process captures one shape: a captured launch keeps its counters, and those of a process are bounded.

python -m benchmarks.fused_changes [--shape 11008x4096] [--out results/fused_changes.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_clock import gpu
from benchmarks.gpu_linear import packed
from benchmarks.gpu_rows import BRAIN, Row, count, keep, normal, reported
from tnc.kernels.change import Change
from tnc.kernels.qlr_change_ops import launched, without_factors
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import dense, run
from tnc.terms import Hadamard, Permutation

SHAPES = {
    "4096x4096": (4096, 4096),
    "14336x4096": (14336, 4096),
    "4096x11008": (4096, 11008),
    "4096x14336": (4096, 14336),
}


def changes(columns: int) -> dict[str, Change]:
    """A rotation, a scaling, an order of all, and an order of what Q alone sees."""
    rotation = Hadamard.random(columns)
    order = Permutation.of(torch.randperm(columns)).indices.cuda()
    return {
        "rotated": Change(signs=rotation.signs.cuda(), factors=rotation.factors),
        "scaled": Change(factor=(torch.rand(columns, device="cuda") + 0.5).to(BRAIN)),
        "ordered": Change(order=order),
        "activation order": Change(order=order, apart=True),
    }


def two(x: Tensor, change: Change, weight: Packed) -> Tensor:
    """The change in launches of its own, then the multiplication."""
    if not change.apart:
        return run(change.apply(x), weight)
    inner = torch.nn.functional.linear(x, weight.right)
    return run(change.apply(x), without_factors(weight)) + torch.nn.functional.linear(inner, weight.left)


def one(x: Tensor, change: Change, weight: Packed) -> Tensor:
    """The change in the launch of the multiplication, whether that is the fastest way or not."""
    found = launched(x, change, (weight,))
    assert found is not None, "16 bits and few tokens"
    return found[0]


def exact(x: Tensor, change: Change, weight: Packed) -> Tensor:
    """The answer in float64."""
    seen = change.apply(x.double())
    if not change.apart:
        return seen @ dense(weight, torch.float64).T
    low_rank = weight.left.double() @ weight.right.double()
    return seen @ dense(without_factors(weight), torch.float64).T + x.double() @ low_rank.T


def rows(n: int, k: int) -> Iterator[Row]:
    """Each change in one launch and in several, and the plain layer, (out_features, in_features) = (n, k)."""
    sets = [packed(n, k, 4, 64) for _ in range(count(n * k * 4.25 / 8, 1))]
    found = changes(k) if n == k else {"rotated": changes(k)["rotated"]}
    for tokens in (1, 2, 4, 8, 16, 32) if n == k else (1, 16):
        x = normal(tokens, k)
        shape, plain = f"{k}->{n}", x.double() @ dense(sets[0], torch.float64).T
        yield Row("plain", shape, tokens, sets, lambda s, x=x: run(x, s), plain)
        for name, change in found.items():
            ways: dict[str, Callable[..., Tensor]] = {"a launch of its own": two, "in the launch": one}
            for way, call in ways.items():
                launch = lambda s, x=x, change=change, call=call: call(x, change, s)  # noqa: E731
                yield Row(f"{name}, {way}", shape, tokens, sets, launch, exact(x, change, sets[0]))


def main() -> None:
    """Run, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/fused_changes.json"))
    parser.add_argument("--shape", choices=list(SHAPES), default="4096x4096", help="out_features x in_features")
    arguments = parser.parse_args()
    machine = gpu()
    print(json.dumps(machine))
    torch.manual_seed(0)
    with torch.no_grad():
        keep(arguments.out, machine, reported(rows(*SHAPES[arguments.shape]), 40))


if __name__ == "__main__":
    main()
