"""Whether error budgets hold: random requests, planned, made, and the held-out error of every layer as stored compared.

    python -m benchmarks.error_budgets MODEL --stats FILE --text FILE [--requests 200] [--jobs 2]

A request is a bound between 0.5 % and 50 % together with random constraints: a layer kept dense, no factors, only the
ranks that serving stacks have, a random half of the bases.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.planned_model import Start, parser
from benchmarks.results import write
from benchmarks.run import machine
from tnc import Plan, Portfolio, RelativeError
from tnc.planning import AllowedBases, AllowedRanks, Constraint, CurveTable, KeepDense, Rules, plan_curves


def requests(table: CurveTable, count: int, seed: int) -> Iterator[tuple[float, Plan]]:
    """Bound and plan of each request."""
    rng = np.random.default_rng(seed)
    names, bases = list(table.layers), [name for name in table.portfolio.bases if name != "dense"]
    for _ in range(count):
        bound = float(np.exp(rng.uniform(np.log(0.005), np.log(0.5))))
        half = tuple(str(name) for name in rng.choice(bases, size=len(bases) // 2, replace=False))
        choices: tuple[Constraint, ...] = (
            KeepDense((str(rng.choice(names)),)), AllowedRanks(()), AllowedRanks(), AllowedBases((*half, "dense")),
        )  # fmt: skip
        rules = Rules(tuple(each for each in choices if rng.random() < 0.3))
        yield bound, plan_curves(table, RelativeError(bound), rules)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan, make and compare."""
    start = Start.of(arguments)
    stats = start.statistics(arguments, arguments.seed)
    with start.workshop(arguments, stats, Portfolio.default()) as shop:
        asked = list(requests(shop.curves(start.model), arguments.requests, arguments.seed))
        rows = []
        for at, made in shop.made([plan for _, plan in asked]):
            bound, largest = asked[at][0], max(layer.heldout for layer in made.values())
            rows.append({"bound": bound, "largest": largest, "bits_per_weight": asked[at][1].bits_per_weight})
    above = [row for row in rows if row["largest"] > row["bound"]]
    nearest = max(row["largest"] / row["bound"] for row in rows)
    print(f"{len(rows)} requests, {len(above)} exceeded; the largest error of a layer is {nearest:.6f} of its bound")
    return {"machine": machine(), "requests": len(rows), "exceeded": len(above), "nearest": nearest, "rows": rows}


def main() -> None:
    """Parse the arguments, run, and write everything as JSON."""
    own = parser(__doc__, out="results/error_budgets.json")
    own.add_argument("--requests", type=int, default=200)
    own.add_argument("--seed", type=int, default=0)
    arguments = own.parse_args()
    result = run(arguments)
    write(arguments.out, result)


if __name__ == "__main__":
    main()
