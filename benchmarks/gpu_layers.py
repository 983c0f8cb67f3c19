"""Times of composed layers and of siblings on this GPU, cold weights, CUDA graphs; answers checked first.

Timed as in `benchmarks.gpu`: a call for each of several sets of together 300 MB, captured in one graph.

python -m benchmarks.gpu_layers [--out results/gpu_layers.json] [--only composed]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.gpu_clock import gpu
from benchmarks.gpu_linear import packed
from benchmarks.gpu_rows import BRAIN, Row, bound_to, count, keep, normal, reported
from tnc.formats import IntFormat
from tnc.kernels.qlr_launch import Packed, tile, vector
from tnc.kernels.qlr_ops import dense, run
from tnc.terms import Diagonal, Expression, Hadamard, LowRank, Permutation, Product, Quantized, Sum, map_tensors

RANK = 64
SIBLINGS = {"q, k, v: 4096, 1024, 1024": (4096, 1024, 1024), "gate, up: 11008 each": (11008, 11008)}
COLUMNS = 4096


def _quantized(n: int, k: int) -> Quantized:
    codes = torch.randint(0, 16, (n, k), device="cuda")
    zero = torch.randint(0, 16, (n, k // 128), device="cuda")
    scale = (torch.rand(n, k // 128, device="cuda") / 16 / 40 + 1e-4).to(BRAIN)
    return Quantized.from_codes(codes, scale, zero, IntFormat(4, group_size=128))


def _on_gpu(term: Expression) -> Expression:
    return map_tensors(term, lambda tensor: tensor.cuda())


def _factors(n: int, k: int) -> LowRank:
    return LowRank(normal(n, RANK, scale=0.05), normal(RANK, k, scale=0.05))


def forms(n: int, k: int) -> dict[str, Callable[[], Expression]]:
    """Operators with the same middle, int4 group 128 + rank 64."""
    before, after = _on_gpu(Hadamard.random(k)), _on_gpu(Hadamard.random(n, seed=1).inverse())
    order = _on_gpu(Permutation.of(torch.randperm(k)))
    scaling = Diagonal(torch.rand(k, device="cuda") + 0.5)
    return {
        "plain": lambda: Sum((_quantized(n, k), _factors(n, k))),
        "rotated inputs": lambda: Product((Sum((_quantized(n, k), _factors(n, k))), before)),
        "rotated on both sides": lambda: Product((after, Sum((_quantized(n, k), _factors(n, k))), before)),
        "scaled": lambda: Product((Sum((_quantized(n, k), _factors(n, k))), scaling)),
        "act order": lambda: Sum((Product((_quantized(n, k), order)), _factors(n, k))),
    }


def composed_rows() -> Iterator[Row]:
    """Every form by its kernel, the rotated ones by einsum too, and dense."""
    for n, k in ((4096, 4096), (11008, 4096), (4096, 11008)):
        weights = [(normal(n, k, scale=0.02),) for _ in range(count(2 * n * k, 1))]
        for tokens in (1, 16, 512):
            x = normal(tokens, k)
            exact = x.double() @ weights[0][0].double().T
            yield Row("dense bf16", f"{k}->{n}", tokens, weights, lambda s, x=x: linear(x, s[0]), exact)
        del weights
        for name, make in forms(n, k).items():
            if n != k and name not in ("plain", "rotated inputs"):
                continue
            operators = [make() for _ in range(count(n * k * 4.25 / 8, 1))]
            for backend in ("auto", "einsum") if name == "rotated inputs" and n == k else ("auto",):
                sets = [bound_to(operator, backend) for operator in (operators if backend == "auto" else operators[:3])]
                for tokens in (1, 16, 512) if backend == "auto" else (1, 16):
                    x = normal(tokens, k)
                    exact = operators[0].linear(x.double())
                    shown = name if backend == "auto" else f"{name}, einsum"
                    yield Row(shown, f"{k}->{n}", tokens, sets, lambda s, x=x: s(x), exact)


def sibling_rows() -> Iterator[Row]:
    """q, k, v and gate, up: apart, in one launch, and in one launch with one right factor; dense as one product."""
    for name, sizes in SIBLINGS.items():
        total = sum(sizes)
        sets = [[packed(n, COLUMNS, 4, RANK) for n in sizes] for _ in range(count(total * COLUMNS * 4.25 / 8, 1))]
        shared = [[replace(each, right=members[0].right) for each in members] for members in sets]
        weights = [(normal(total, COLUMNS, scale=0.02),) for _ in range(count(2 * total * COLUMNS, 1))]
        for tokens in (1, 16):
            x = normal(tokens, COLUMNS)
            launch = vector if tokens == 1 else tile
            ways: dict[str, tuple[list[list[Packed]], Callable[..., Any]]] = {
                "apart": (sets, lambda s, x=x: [run(x, each) for each in s]),
                "apart, one R": (shared, lambda s, x=x: [run(x, each) for each in s]),
                "one launch": (sets, lambda s, x=x, launch=launch: launch(x, *s)),
                "one launch, one R": (shared, lambda s, x=x, launch=launch: launch(x, *s)),
            }
            for way, (members, call) in ways.items():
                exact = torch.cat([(x.double() @ dense(each, torch.float64).T).flatten() for each in members[0]])
                yield Row(f"{name}: {way}", "", tokens, members, call, exact)
            exact = x.double() @ weights[0][0].double().T
            yield Row(f"{name}: dense, one product", "", tokens, weights, lambda s, x=x: linear(x, s[0]), exact)


GROUPS = {"composed": composed_rows, "siblings": sibling_rows}


def main() -> None:
    """Run, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu_layers.json"))
    parser.add_argument("--only", choices=list(GROUPS))
    arguments = parser.parse_args()
    machine = gpu()
    print(json.dumps(machine))
    torch.manual_seed(0)
    chosen = [make for name, make in GROUPS.items() if arguments.only in (None, name)]
    keep(arguments.out, machine, chain.from_iterable(reported(make(), 60) for make in chosen))


if __name__ == "__main__":
    main()
