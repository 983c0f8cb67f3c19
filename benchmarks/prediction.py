"""What the prediction of a plan is worth: measured against predicted KL of random plans, on held-out text.

    python -m benchmarks.prediction MODEL --stats FILE --text FILE [--plans 48] [--below 0.3] [--windows 8]

Plans are drawn at random budgets, with random weights of the layers and a random half of the bases each, so that they
mix bases, ranks, factor formats and shared factors as no optimum would; those predicted above ``--below`` are drawn
again. Rank correlation and ratio are of all plans. The scale is then set by one plan (a factor) or by two (a power
law, as large truncations cost more than predicted), chosen by their predictions alone; printed is the share of the
other plans that lie within 15 %, and its mean over every choice of the one or two plans.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.planned_model import DTYPE, measured, parser
from benchmarks.run import machine
from benchmarks.windows import spread
from tnc import BitsPerWeight, Plan, compress
from tnc.errors import BudgetError
from tnc.models.evaluate import evaluate
from tnc.models.text import read_text, token_windows
from tnc.planning import AllowedBases, CurveTable, Rules, plan_curves

Floats = NDArray[np.float64]

WITHIN = 0.15


def draw_plans(table: CurveTable, count: int, below: float, seed: int) -> list[Plan]:
    """Random plans of less than ``below`` predicted nats."""
    rng, found = np.random.default_rng(seed), []
    bases = [name for name in table.portfolio.bases if name != "dense"]
    while len(found) < count:
        some = rng.choice(bases, size=len(bases) // 2, replace=False)
        weights = dict(zip(table.layers, rng.lognormal(sigma=1.5, size=len(table.layers)), strict=True))
        rules = Rules(constraints=(AllowedBases(("dense", *some)),), weights=weights)
        try:
            plan = plan_curves(table, BitsPerWeight(float(rng.uniform(2.3, 6.0))), rules)
        except BudgetError:  # these bases do not reach that few bits
            continue
        if (plan.predicted_nats or 0) < below:
            found.append(plan)
    return found


def by_one(predicted: Floats, measured: Floats, at: int) -> Floats:
    """The prediction of all plans, scaled by plan ``at``."""
    return predicted * measured[at] / predicted[at]


def by_two(predicted: Floats, measured: Floats, first: int, second: int) -> Floats:
    """The prediction of all plans, by the power law through two of them."""
    x, y = np.log(predicted), np.log(measured)
    slope = (y[second] - y[first]) / (x[second] - x[first])
    scaled: Floats = np.exp(y[first] + slope * (x - x[first]))
    return scaled


def share_within(scaled: Floats, measured: Floats, used: tuple[int, ...]) -> float:
    """Share of the plans that were not used whose measured KL is within 15 % of the scaled prediction."""
    rest = np.delete(np.arange(len(measured)), used)
    return float((np.abs(scaled[rest] / measured[rest] - 1) <= WITHIN).mean())


def summary(predicted: Floats, relative: Floats, measured: Floats) -> dict[str, Any]:
    """Rank correlations, ratios, and what one or two measured plans make of them."""
    order = np.argsort(predicted)
    middle, low, high = (int(order[round(q * (len(order) - 1))]) for q in (0.5, 0.15, 0.85))
    pairs = [(a, b) for a, b in itertools.combinations(range(len(predicted)), 2)
             if abs(np.log(predicted[a] / predicted[b])) > np.log(3)]  # fmt: skip
    ratio = measured / predicted
    return {
        "plans": len(measured), "measured_from": float(measured.min()), "measured_to": float(measured.max()),
        "spearman_nats": float(spearmanr(predicted, measured)[0]),
        "spearman_relative": float(spearmanr(relative, measured)[0]),
        "ratio_median": float(np.median(ratio)), "ratio_from": float(ratio.min()), "ratio_to": float(ratio.max()),
        "ratio_spread": float(np.std(np.log(ratio))),
        "relative_ratio_spread": float(np.std(np.log(measured / relative))),
        "within_by_one": share_within(by_one(predicted, measured, middle), measured, (middle,)),
        "within_by_two": share_within(by_two(predicted, measured, low, high), measured, (low, high)),
        "within_by_any_one": float(np.mean([share_within(by_one(predicted, measured, at), measured, (at,))
                                            for at in range(len(measured))])),
        "within_by_any_two": float(np.mean([share_within(by_two(predicted, measured, *pair), measured, pair)
                                            for pair in pairs])) if pairs else None,
    }  # fmt: skip


def main() -> None:
    """Parse the arguments, draw, measure, print, and write everything as JSON."""
    own = parser(__doc__, windows=8, out="results/prediction.json")
    own.add_argument("--plans", type=int, default=48)
    own.add_argument("--below", type=float, default=0.27, help="predicted nats of a plan at most")
    own.add_argument("--seed", type=int, default=0)
    arguments = own.parse_args()
    model, tokenizer, stats, table = measured(arguments)
    whole = token_windows(tokenizer, read_text(arguments.text), arguments.context, keep_last=False)
    windows = spread(whole, arguments.windows)
    rows = []
    for plan in draw_plans(table, arguments.plans, arguments.below, arguments.seed):
        small = compress(model, plan, stats=stats, dtype=DTYPE)
        kl = evaluate(small, windows, reference=model).kl
        relative = sum(layer.error**2 for layer in plan.layers.values())
        rows.append({"bits_per_weight": plan.bits_per_weight, "predicted": plan.predicted_nats, "relative": relative,
                     "kl": kl})  # fmt: skip
        print("{bits_per_weight:7.3f} bits  predicted {predicted:.5f}  KL {kl:.5f}".format(**rows[-1]), flush=True)
    columns = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("predicted", "relative", "kl"))
    found = summary(*columns)
    print(json.dumps(found, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "summary": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
