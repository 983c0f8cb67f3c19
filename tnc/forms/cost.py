"""What an operator costs to apply: multiplications a token, and seconds by a roofline of the machine.

``seconds = calls * overhead + max(flops / peak, bytes / bandwidth)``. Flops and calls are those of the plan that the
einsum kernel makes for that many tokens; bytes are the stored tensors once, the matrices that the plan rebuilds
(written and read in float32), and the tokens in and out. It is meant to order forms, not to be a timer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tnc.kernels import Plan, plan
from tnc.terms import Expression, Product, Sum


@dataclass(frozen=True)
class Machine:
    """Rates of one device.

    Attributes:
        name: for reports.
        flops_per_second: of a large float32 matrix product.
        bytes_per_second: of a copy too large for the caches, read and written bytes together.
        seconds_per_call: of one small matrix product: the overhead of a step.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    seconds_per_call: float


# measure_machine() on one of 2 CPU cores, torch 2.13: medians of five runs on a shared machine, rounded
REFERENCE_MACHINE = Machine("one CPU core", 2.8e10, 1.0e10, 3.5e-6)


@dataclass(frozen=True)
class Cost:
    """Of one call of an operator with some tokens.

    Attributes:
        tokens: rows of the input.
        macs_per_token: multiply-adds of the plan over the tokens; rebuilding is spread over them.
        seconds: predicted for the whole call.
        plan: what is contracted in which order.
    """

    tokens: int
    macs_per_token: float
    seconds: float
    plan: str


def cost_of(operator: Expression, tokens: int, machine: Machine = REFERENCE_MACHINE, *, itemsize: int = 4) -> Cost:
    """Cost of ``operator`` applied to ``tokens`` rows of ``itemsize`` bytes a number, without a bias."""
    chosen = plan(operator, tokens)
    rows, columns = operator.shape
    moved = operator.storage_bits / 8 + tokens * (rows + columns) * itemsize + 8 * _rebuilt(operator)
    busy = max(chosen.flops / machine.flops_per_second, moved / machine.bytes_per_second)
    seconds = busy + _calls(chosen) * machine.seconds_per_call
    return Cost(tokens, chosen.flops / 2 / tokens, seconds, chosen.describe())


def measure_machine(name: str = "this machine", *, device: torch.device | str = "cpu") -> Machine:
    """The rates of a device, from a 1024³ product, a copy of 64 MB and a product of one token; about a second."""
    a = torch.ones(1024, 1024, device=device)
    large = torch.ones(2**24, device=device)
    target = torch.empty_like(large)
    small, one = torch.ones(16, 16, device=device), torch.ones(1, 16, device=device)
    product = _median(lambda: a @ a, device)
    copy = _median(lambda: target.copy_(large), device)
    call = _median(lambda: torch.nn.functional.linear(one, small), device)
    return Machine(name, 2 * 1024**3 / product, 2 * large.numel() * 4 / copy, call)


def _median(run: Callable[[], torch.Tensor], device: torch.device | str, repeats: int = 9) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _rebuilt(operator: Expression) -> int:
    """Entries of quantized and other leaves that every plan rebuilds."""
    if isinstance(operator, (Sum, Product)):
        return sum(_rebuilt(term) for term in operator.terms)
    return (
        operator.shape[0] * operator.shape[1]
        if any(not t.is_floating_point() for t in operator.tensors().values())
        else 0
    )


def _calls(chosen: Plan) -> int:
    """Steps of a plan: contractions, and one for each rebuilt matrix."""
    parts = getattr(chosen, "parts", None)
    if parts is not None:
        return sum(map(_calls, parts)) + len(getattr(chosen, "folded", ())) + 1
    return len(getattr(chosen, "steps", ())) or 1
