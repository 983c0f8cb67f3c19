"""Predicted against measured times of every way to apply a matrix product operator on CPU.

Ways take turns, so that what else the machine does falls on all of them: medians over the rounds, and of the ratio of
the chosen way to the better of dense and einsum in the same round. Before each run 64 MB of other memory are read, so
that weights come from memory as they do in a model, and the way runs once without a clock, because what another way
has freed slows it down. Every answer is checked.

python -m benchmarks.mpo_prices [--tokens 1 16 256] [--columns 4096] [--rounds 9] [--all] [--kept 0]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cases.mpo import LETTERS, random_mpo
from benchmarks.run import machine
from tnc import Mpo
from tnc.kernels.kept import KEPT
from tnc.kernels.mpo_prices import candidates
from tnc.terms import dense64

Way = Callable[[], Tensor]


def rounds(ways: dict[str, Way], expected: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in every round."""
    other = torch.ones(2**24)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        error = float((way() - expected).norm() / expected.norm())
        assert error < 1e-5, f"{name} is wrong by {error:.1e}"
    for _ in range(repeats):
        for name, way in ways.items():
            way()
            other.sum()
            start = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - start)
    return found


def compare(operator: Mpo, tokens: int, most: int, repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measured and predicted seconds; the ways in order of their predictions, ``most`` of them."""
    rows, columns = operator.shape
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    weight, tensors = operator.to_dense(), operator.tensors()
    plans = sorted(candidates(operator, "", tokens), key=lambda plan: plan.seconds)[:most]
    letters, ins = LETTERS[len(operator.cores)], operator.in_modes
    ways: dict[str, Way] = {
        "dense": lambda: linear(x, weight),
        "torch.einsum": lambda: torch.einsum(letters, x.reshape(tokens, *ins), *operator.cores).reshape(tokens, rows),
    }
    ways |= {plan.describe(): lambda plan=plan: plan(x, tensors) for plan in plans}  # type: ignore[misc]
    KEPT.release()
    return rounds(ways, x.double() @ dense64(operator).T, repeats), {plan.describe(): plan.seconds for plan in plans}


def main() -> None:
    """Print a table of all cases, and how far the predictions are off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--kept", type=int, default=1, help="weights that may be kept; 0 times what others run then")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--all", action="store_true", help="time every way, not the four of least predicted time")
    arguments = parser.parse_args()
    print(json.dumps(machine()))
    KEPT.allow(weights=arguments.kept)
    ratios, losses, against = [], [], []
    with torch.no_grad():
        for cores, rank in ((2, 16), (2, 64), (3, 16), (3, 64)):
            operator = random_mpo(4096, arguments.columns, cores, rank)
            for tokens in arguments.tokens:
                runs, predicted = compare(operator, tokens, 99 if arguments.all else 4, arguments.rounds)
                measured = {name: statistics.median(times) for name, times in runs.items()}
                chosen = min(predicted, key=lambda name: predicted[name])
                better = min("dense", "torch.einsum", key=lambda name: measured[name])
                against.append(statistics.median(a / b for a, b in zip(runs[chosen], runs[better], strict=True)))
                ratios += [predicted[name] / measured[name] for name in predicted]
                losses.append(measured[chosen] / min(measured[name] for name in predicted))
                print(f"\n{cores} cores, bond {rank}, {tokens} tokens: {against[-1]:.3f} of the better of two")
                for name, seconds in measured.items():
                    guess = f"{1e3 * predicted[name]:9.2f}" if name in predicted else 9 * " "
                    print(f"  {1e3 * seconds:9.2f} ms {guess}  {name}", flush=True)
    ratios.sort()
    print(
        f"\nof the better of two: {min(against):.2f} to {max(against):.3f}; predicted / measured: median "
        f"{statistics.median(ratios):.2f}, 10th and 90th percentile {ratios[len(ratios) // 10]:.2f} and "
        f"{ratios[len(ratios) * 9 // 10]:.2f}; the way chosen took {statistics.median(losses):.2f} (median) and at "
        f"most {max(losses):.2f} times the fastest one timed"
    )


if __name__ == "__main__":
    main()
