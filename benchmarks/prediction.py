"""What the prediction of a plan is worth: measured against predicted KL of random plans, on held-out text.

    python -m benchmarks.prediction MODEL --stats FILE --text FILE [--plans 48] [--below 0.27] [--jobs 2] [--alone 4]

Plans are drawn at random budgets, with random weights of the layers and a random half of the bases each, so that they
mix bases, ranks, factor formats and shared factors as no optimum would; those predicted above ``--below`` are drawn
again. The scale is set without them, by two plans of the planner itself: those of ``--below`` predicted nats and of a
quarter of it; it is the geometric mean of their ratios. Printed is the share of the random plans whose measured KL is
within 15 % of the scaled prediction, and, to compare, the same for scales set by one or two of the random plans. With
``--probes N`` predictions weighted by what each layer costs alone on N windows of the calibration text stand beside.

Rows are written as they come, and not measured again when the command is repeated.

``--alone N`` measures every layer alone, and every block alone, of N of the plans, evenly spread over their ratios:
what the sum over layers leaves out is within a layer, between the layers of a block, or between blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.budgets import portfolio_of
from benchmarks.planned_model import Start, parser, probe_weights
from benchmarks.results import read, write
from benchmarks.run import machine
from benchmarks.workshop import Made
from tnc import BitsPerWeight, Nats, Plan, Portfolio
from tnc.errors import BudgetError
from tnc.models.evaluate import Evaluation
from tnc.planning import AllowedBases, CurveTable, Rules, plan_curves

Floats = NDArray[np.float64]

WITHIN = 0.15
_LEVELS = (0.25, 1.0)  # of --below: the two plans that set the scale


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
        if _nats(plan) < below:  # without the random weights
            found.append(plan)
    return found


def _nats(plan: Plan) -> float:
    return sum(layer.nats or 0.0 for layer in plan.layers.values())


def share_within(ratios: Floats, scale: float, used: Sequence[int] = ()) -> float:
    """Share of the plans that were not used whose measured KL is within 15 % of the scaled prediction."""
    rest = np.delete(ratios, used)  # measured over predicted
    return float((np.abs(scale / rest - 1) <= WITHIN).mean())


def summary(rows: Sequence[Mapping[str, float]], scale: float) -> dict[str, Any]:
    """Rank correlations, ratios, and what scales set by other plans make of them."""
    predicted, relative, measured, errors = (
        np.array([row[key] for row in rows], dtype=np.float64) for key in ("predicted", "relative", "kl", "kl_error")
    )
    ratios, logs = measured / predicted, np.log(measured / predicted)
    pairs = list(itertools.combinations(range(len(ratios)), 2))
    by_one = [share_within(ratios, ratios[at], (at,)) for at in range(len(ratios))]
    by_two = [share_within(ratios, float(np.exp(logs[[*pair]].mean())), pair) for pair in pairs]
    return {
        "plans": len(ratios), "measured_from": float(measured.min()), "measured_to": float(measured.max()),
        "relative_standard_error": float(np.median(errors / measured)),
        "spearman_nats": float(spearmanr(predicted, measured)[0]),
        "spearman_relative": float(spearmanr(relative, measured)[0]),
        "ratio_median": float(np.median(ratios)), "ratio_from": float(ratios.min()), "ratio_to": float(ratios.max()),
        "ratio_spread": float(logs.std()), "relative_ratio_spread": float(np.std(np.log(measured / relative))),
        "scale": scale, "within": share_within(ratios, scale),
        "largest_miss": float(np.abs(scale / ratios - 1).max()),
        "within_by_any_one": float(np.mean(by_one)), "within_by_any_two": float(np.mean(by_two)),
    }  # fmt: skip


def parts(start: Start, plan: Plan, made: Mapping[str, Made]) -> dict[str, Any]:
    """KL of a plan, the sum over its layers alone and over its blocks alone, each over the prediction."""
    matrices = {name: layer.matrix for name, layer in made.items()}
    blocks: dict[str, list[str]] = {}
    for name in matrices:
        number = next((part for part in name.split(".") if part.isdigit()), "")
        blocks.setdefault(number, []).append(name)
    sets = [matrices, *({name: matrices[name] for name in names} for names in blocks.values())]
    sets += [{name: matrix} for name, matrix in matrices.items()]
    whole, *rest = (scores.kl or 0.0 for scores in start.scores_of(sets))
    by_block, alone = rest[: len(blocks)], dict(zip(matrices, rest[len(blocks) :], strict=True))
    predicted = _nats(plan)
    nats = {name: layer.nats or 0.0 for name, layer in plan.layers.items()}
    large = [alone[name] / nats[name] for name in nats if nats[name] > 0.02 * predicted]
    return {
        "whole": whole / predicted, "layers": sum(alone.values()) / predicted,
        "blocks": sum(by_block) / predicted, "layer_from": min(large), "layer_to": max(large), "alone": alone,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw, measure and summarise; what the file has is not measured again."""
    start, found = Start.of(arguments), read(arguments.out)
    stats = start.statistics(arguments, arguments.seed)
    portfolio = portfolio_of(arguments.ranks, trellis=True) if arguments.trellis else Portfolio.default()
    with start.workshop(arguments, stats, portfolio) as shop:
        table = shop.curves(start.model, arguments.curves)
        if arguments.probes and "probes" not in found:
            found["probes"] = probe_weights(arguments, start, shop, table, arguments.seed)
            write(arguments.out, found)
        own = [plan_curves(table, Nats(level * arguments.below)) for level in _LEVELS]
        plans = [*own, *draw_plans(table, arguments.plans, arguments.below, arguments.seed)]
        have = {row["plan"] for row in found["rows"]}
        todo = [at for at in range(len(plans)) if at not in have]
        for done, made in shop.made([plans[at] for at in todo]):
            scores = start.scores({name: layer.matrix for name, layer in made.items()})
            found["rows"].append(row_of(todo[done], plans[todo[done]], scores))
            write(arguments.out, found)
            line = "{bits_per_weight:7.3f} bits  predicted {predicted:.5f}  KL {kl:.5f} ± {kl_error:.5f}"
            print(line.format(**found["rows"][-1]) + (", sets the scale" if todo[done] < len(own) else ""), flush=True)
        found |= {"machine": machine(), "summary": summarised(found)}
        write(arguments.out, found)
        for at in _spread_over_ratios(found["rows"], arguments.alone):
            made = next(made for _, made in shop.made([plans[at]]))
            found.setdefault("parts", []).append({"plan": at, **parts(start, plans[at], made)})
            write(arguments.out, found)
            line = "over the prediction: whole {whole:.3f}, layers {layers:.3f}, blocks {blocks:.3f}; layers from "
            print((line + "{layer_from:.3f} to {layer_to:.3f}").format(**found["parts"][-1]), flush=True)
    return found


def row_of(at: int, plan: Plan, scores: Evaluation) -> dict[str, Any]:
    """What is kept of a plan."""
    layers = {name: (layer.nats or 0.0, layer.error**2) for name, layer in plan.layers.items()}
    return {
        "plan": at, "bits_per_weight": plan.bits_per_weight, "predicted": sum(nats for nats, _ in layers.values()),
        "relative": sum(error for _, error in layers.values()), "kl": scores.kl or 0.0,
        "kl_error": scores.kl_error or 0.0, "layers": layers,
    }  # fmt: skip


def summarised(found: Mapping[str, Any]) -> dict[str, Any]:
    """`summary` of the random plans by the scale of the planner's own; also of predictions weighted by probes."""
    kept = {"nats": found["rows"]}
    if "probes" in found:
        weights = found["probes"]
        kept["probed nats"] = [
            {**row, "predicted": sum(weights[name] * nats for name, (nats, _) in row["layers"].items())}
            for row in found["rows"]
        ]
    made = {}
    for objective, rows in kept.items():
        own = [row["kl"] / row["predicted"] for row in rows if row["plan"] < len(_LEVELS)]
        scale = float(np.exp(np.log(own).mean()))
        made[objective] = summary([row for row in rows if row["plan"] >= len(_LEVELS)], scale)
    return made


def _spread_over_ratios(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Numbers of some random plans, from the one least above its prediction to the one most above it."""
    random = sorted((row["kl"] / row["predicted"], row["plan"]) for row in rows if row["plan"] >= len(_LEVELS))
    return [random[at][1] for at in np.linspace(0, len(random) - 1, count).round().astype(int)] if count else []


def main() -> None:
    """Parse the arguments, run and print."""
    own = parser(__doc__, out="results/prediction.json")
    own.add_argument("--plans", type=int, default=48)
    own.add_argument("--below", type=float, default=0.27, help="predicted nats of a plan at most")
    own.add_argument("--trellis", action="store_true", help="the portfolio of benchmarks.budgets --trellis")
    own.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="of its 4-bit factors")
    own.add_argument("--alone", type=int, default=0, help="plans whose layers and blocks are measured alone")
    own.add_argument("--seed", type=int, default=0)
    arguments = own.parse_args()
    print(json.dumps(run(arguments)["summary"], indent=1))


if __name__ == "__main__":
    main()
