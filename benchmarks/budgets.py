"""Planned against uniform, bits-only and rank-only models at equal bits, over several samples of the calibration text.

    python -m benchmarks.budgets MODEL --calib TEXT --text TEXT --seeds 0 1 2 --jobs 8 --out results/budgets.json
    python -m benchmarks.budget_table results/budgets.json [MORE.json ...]

One pass over the layers measures the curves of a sample (a seed of calibration windows and labels); all plans come from
them, and the layers of a plan from the bases fitted for the curves. Rows are scored by the first process, written as
they come, and not computed again when the command is repeated; ``--seconds`` starts no sample after that time.

``planned`` chooses among GPTQ integers with and without factors, ``bits only`` without, ``rank only`` low rank alone.
``uniform`` is one GPTQ integer everywhere, ``uniform + factors`` with one rank and factor format: those of least
predicted nats within the budget. With ``--trellis``, ``planned of all`` chooses among two-sided trellises of 2, 3 and 4
bits and two-sided refined int5, too, without factors; ``trellisN`` is one trellis everywhere. ``--aims`` are budgets of
``planned`` and ``planned of all`` alone.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.planned_model import Start, parser, probe_weights, totals
from benchmarks.results import read, write
from benchmarks.run import machine
from tnc import BitsPerWeight, IntFormat, Plan, Portfolio
from tnc.decompose import InputRotation, OutputRotation, QuantizeStage
from tnc.errors import BudgetError
from tnc.models.evaluate import evaluate
from tnc.planning import AllowedBases, AllowedRanks, Base, Choice, CurveTable, Option, Rules, plan_curves, plan_of

_TRELLISES = tuple(f"trellis{bits}_diagonal" for bits in (2, 3, 4))


def portfolio_of(ranks: Sequence[int], *, trellis: bool) -> Portfolio:
    """The default one, factors of 16 and 4 bits, and groups of 128 and 32 without; with trellises, two-sided bases."""
    found = Portfolio.default(formats=_TRELLISES if trellis else (), factor_bits=(16, 4))
    extra = {f"int{bits}-g{group}": Base(QuantizeStage(IntFormat(bits, group_size=group)), compensated=False)
             for bits in (2, 3, 4) for group in (128, 32)}  # fmt: skip
    if trellis:
        stage = QuantizeStage(IntFormat(5), method="yaqa", refine=3)
        extra["yaqa-int5"] = Base(stage, compensated=False, transforms=(InputRotation(), OutputRotation()))
    return replace(found, bases={**found.bases, **extra}, factor_ranks=tuple(ranks))


def plans(
    table: CurveTable, budgets: list[float], aims: list[float], probed: Mapping[str, float]
) -> Iterator[tuple[str, float, Plan]]:
    """Kind, budget and plan; a kind that cannot reach a budget is left out with a line that says so."""
    every = table.portfolio.bases
    gptq = AllowedBases(tuple(name for name in every if not name.startswith(("trellis", "yaqa"))))
    rules = {
        "planned": Rules(constraints=(gptq,)),
        "bits only": Rules(constraints=(gptq, AllowedRanks(()))),
        "rank only": Rules(constraints=(AllowedBases(("none", "dense")),)),
    }
    if len(gptq.bases) < len(every):
        rules["planned of all"] = Rules()
        for name in (name for name in every if name.startswith("trellis")):
            yield name, 0.0, plan_of(table, {layer: Choice(name) for layer in table.layers})
    if probed:
        rules |= {f"{kind}, probed": replace(rules[kind], weights=probed)
                  for kind in ("bits only", "planned", "planned of all") if kind in rules}  # fmt: skip
    for budget in sorted({*budgets, *aims}):
        for kind, rule in rules.items():
            if budget in budgets or kind.startswith("planned"):
                try:
                    yield kind, budget, plan_curves(table, BitsPerWeight(budget), rule)
                except BudgetError as error:
                    print(f"{kind} {budget:g}: {error}", flush=True)
        for kind, ranks in (("uniform", False), ("uniform + factors", True)) if budget in budgets else ():
            choices = uniform_choices(table, budget, ranks=ranks)
            if choices is not None:
                yield kind, budget, plan_of(table, choices)


def uniform_choices(table: CurveTable, budget: float, *, ranks: bool) -> dict[str, Choice] | None:
    """The uniform GPTQ choice of least predicted nats within a budget; whole rows where a group does not divide."""
    best: tuple[float, dict[str, Choice]] | None = None
    kinds = dict.fromkeys((o.choice.base, o.choice.rank, o.choice.factors) for o in _options(table) if _is_gptq(o))
    for base, rank, factors in kinds:
        options = [_option(table, layer, base, rank, factors) for layer in table.layers]
        if bool(rank) != ranks or None in options:
            continue
        known = [option for option in options if option is not None]
        if sum(option.bits for option in known) <= budget * table.elements:
            nats = sum(option.heldout_nats for option in known)
            if best is None or nats < best[0]:
                best = nats, dict(zip(table.layers, (option.choice for option in known), strict=True))
    return None if best is None else best[1]


def _options(table: CurveTable) -> Iterator[Option]:
    return (option for layer in table.layers.values() for option in layer.options)


def _is_gptq(option: Option) -> bool:
    return option.choice.base.startswith("int") and not option.choice.shared


def _option(table: CurveTable, layer: str, base: str, rank: int, factors: str) -> Option | None:
    """Of a layer, with whole rows where it lacks the group size."""
    options = {o.choice: o for o in table.layers[layer].options}
    whole = f"{base.split('-')[0]}-row"
    return options.get(Choice(base, rank, factors)) or options.get(Choice(whole, rank, factors))


def subject(arguments: argparse.Namespace) -> str:
    """What a table is of: the model, its experts where they are layers of their own, and the calibration text."""
    text = (arguments.calib or arguments.stats).name.split(".")[0]
    return f"{arguments.model.name}{' with its experts' if arguments.experts else ''}, {text}"


def run(arguments: argparse.Namespace) -> None:
    """All rows that the file lacks, seed by seed."""
    end = time.monotonic() + arguments.seconds
    start, name, found = Start.of(arguments), subject(arguments), read(arguments.out)
    found["machine"] = machine()
    found.setdefault("dense", {})[name] = evaluate(start.dense, start.windows).to_json()
    for seed in arguments.seeds:
        have = {(row["kind"], row["budget"]) for row in found["rows"] if (row["model"], row["seed"]) == (name, seed)}
        if time.monotonic() < end and [seed, name] not in found.setdefault("complete", []):
            _run_seed(arguments, start, seed, have, found)
            found["complete"].append([seed, name])
            write(arguments.out, found)


def _run_seed(
    arguments: argparse.Namespace, start: Start, seed: int, have: set[tuple[str, float]], found: dict[str, Any]
) -> None:
    name, begin = subject(arguments), time.monotonic()
    stats = start.statistics(arguments, seed)
    with start.workshop(arguments, stats, portfolio_of(arguments.ranks, trellis=arguments.trellis)) as shop:
        print(f"{name} seed {seed}: statistics {time.monotonic() - begin:.0f} s", flush=True)
        table = shop.curves(start.model, arguments.curves)
        print(f"{name} seed {seed}: curves {time.monotonic() - begin:.0f} s", flush=True)
        probed = probe_weights(arguments, start, shop, table, seed) if arguments.probes else {}
        every = plans(table, arguments.budgets, arguments.aims, probed)
        todo = [each for each in every if each[:2] not in have]
        for at, made in shop.made([plan for *_, plan in todo]):
            kind, budget, plan = todo[at]
            options = Counter(layer.choice.describe() for layer in plan.layers.values())
            assert sum(each.bits for each in made.values()) == plan.storage_bits, "curves count what is stored"
            scores = start.scores({layer: each.matrix for layer, each in made.items()})
            found["rows"].append({
                "model": name, "seed": seed, "kind": kind, "budget": budget, "lower_bound": plan.lower_bound,
                **totals(made), **scores.to_json(), "options": dict(options),
            })  # fmt: skip
            write(arguments.out, found)
            print(_line(found["rows"][-1]), flush=True)
    print(f"{name} seed {seed}: {time.monotonic() - begin:.0f} s", flush=True)


def _line(row: Mapping[str, Any]) -> str:
    return (
        "{kind:<17} {budget:4.2f} seed {seed}  {bits_per_weight:6.3f} b  held {heldout:.4f}  nats {predicted_nats:.4f}"
        "  KL {kl:.4f}±{kl_error:.4f}  Δloss {delta_nats:+.4f}±{delta_nats_error:.4f}  ppl {perplexity:.3f}"
    ).format(**row)


def main() -> None:
    """Parse the arguments and run."""
    own = parser(__doc__, out="results/budgets.json")
    own.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0])
    own.add_argument("--aims", type=float, nargs="*", default=[], help="budgets of planned models alone")
    own.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="of 4-bit factors")
    own.add_argument("--trellis", action="store_true", help="two-sided trellises and integers, too")
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration windows and labels")
    own.add_argument("--seconds", type=float, default=float("inf"), help="start no seed after this time")
    run(own.parse_args())


if __name__ == "__main__":
    main()
