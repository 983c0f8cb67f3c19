"""Times of rotations and of three-core operators on this GPU: graphs of 20 calls, medians; answers checked first.

python -m benchmarks.gpu_rotations [--out results/gpu_rotations.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_clock import gpu, replayed
from benchmarks.results import write
from tnc.kernels.hadamard import hadamard
from tnc.kernels.mpo3 import mpo3
from tnc.kernels.mpo_prices import candidates
from tnc.terms import Hadamard, Mpo

BRAIN = torch.bfloat16
CALLS = 20


def microseconds(way: Callable[[], Tensor]) -> float:
    """Median time of one call in a graph of `CALLS`."""
    time, _ = replayed(lambda: [way() for _ in range(CALLS)], repeats=15)
    return time * 1e3 / CALLS


def row(name: str, shape: str, tokens: int, way: Callable[[], Tensor], exact: Tensor) -> dict[str, Any]:
    """Error, and the time where it is small."""
    error = float((way().double() - exact).norm() / exact.norm())
    found = {"way": name, "shape": shape, "tokens": tokens, "error": error, "us": None}
    if error < 1e-2:
        found["us"] = microseconds(way)
    print(f"{name:<70}{shape:>14}{tokens:>6} {found['us']} us  error {error:.1e}", flush=True)
    return found


def rotations() -> list[dict[str, Any]]:
    """The launch, the small products, and the dense rotation."""
    rows = []
    for size in (4096, 11008, 14336):
        term = Hadamard.random(size)
        term = Hadamard(term.signs.cuda(), size, term.factors, False)
        dense = term.to_dense().to(BRAIN)
        for tokens in (1, 16, 256, 4096):
            x = torch.randn(tokens, size, device="cuda").to(BRAIN)
            exact = term.linear(x.double())
            fused = lambda x=x, term=term: hadamard(x, term.signs, term.factors, False)  # noqa: E731
            eager = lambda x=x, term=term: term.linear(x)  # noqa: E731
            plain = lambda x=x, dense=dense: torch.nn.functional.linear(x, dense)  # noqa: E731
            for name, way in (("one launch", fused), ("small products", eager), ("dense", plain)):
                rows.append(row(f"rotation, {name}", str(size), tokens, way, exact))
    return rows


def three_cores() -> list[dict[str, Any]]:
    """Every way of three cores of bond 32, and torch's einsum."""
    rows = []
    shapes = ((1, 16, 16, 32), (32, 16, 16, 32), (32, 16, 16, 1))
    operator = Mpo(tuple((torch.randn(s, device="cuda") / (s[0] * 16) ** 0.5).to(BRAIN) for s in shapes))
    matrix = operator.to_dense().double()
    for tokens in (1, 16):
        x = torch.randn(tokens, 4096, device="cuda").to(BRAIN)
        exact = x.double() @ matrix.T
        plain = lambda x=x: torch.einsum(  # noqa: E731
            "tijk,aoib,bpjc,cqkd->topq", x.unflatten(1, (16, 16, 16)), *operator.cores
        ).flatten(1)
        fused = lambda x=x: mpo3(x, *operator.cores)  # noqa: E731
        rows.append(row("3 cores, torch.einsum", "4096->4096", tokens, plain, exact))
        rows.append(row("3 cores, one launch", "4096->4096", tokens, fused, exact))
        for plan in sorted(candidates(operator, "", tokens), key=lambda plan: plan.seconds)[:5]:
            name = f"3 cores, {1e6 * plan.seconds:.1f} predicted: {plan.describe()}"
            rows.append(row(name, "4096->4096", tokens, lambda x=x, plan=plan: plan(x, operator.tensors()), exact))
    return rows


def main() -> None:
    """Run, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu_rotations.json"))
    arguments = parser.parse_args()
    machine = gpu()
    print(json.dumps(machine))
    torch.manual_seed(0)
    with torch.no_grad():
        rows = rotations() + three_cores()
    write(arguments.out, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
