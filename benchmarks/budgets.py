"""Planned against uniform, bits-only and rank-only models at equal bits, measured on held-out text.

python -m benchmarks.budgets MODEL --stats FILE --text FILE [--curves FILE] [--budgets 2.5 3 3.5 4] [--windows 64]
"""

from __future__ import annotations

import json

from benchmarks.planned_model import DTYPE, measured, parser
from tnc import BitsPerWeight, Plan, compress
from tnc.errors import BudgetError
from tnc.models.evaluate import evaluate_many
from tnc.models.text import read_text, token_windows
from tnc.planning import AllowedBases, AllowedRanks, CurveTable, Rules, plan_curves

RULES = {
    "planned": Rules(),
    "bits only": Rules(constraints=(AllowedRanks(()),)),
    "rank only": Rules(constraints=(AllowedBases(("none", "dense")),)),
}


def plans(table: CurveTable, budgets: list[float]) -> dict[str, Plan]:
    """Plans by name; a kind that cannot reach a budget is left out with a line that says so."""
    found: dict[str, Plan] = {}
    for budget in budgets:
        for name, rules in RULES.items():
            try:
                found[f"{name} {budget:g}"] = plan_curves(table, BitsPerWeight(budget), rules)
            except BudgetError as error:
                print(f"{name} {budget:g}: {error}")
    for bits in (2, 3, 4):
        bases = (f"int{bits}-g64", f"int{bits}-row")
        rules = Rules(constraints=(AllowedBases(bases), AllowedRanks(())))
        stored = sum(max(o.bits for o in layer.options if o.choice.base in bases and not o.choice.rank)
                     for layer in table.layers.values())  # fmt: skip
        found[f"uniform int{bits}"] = plan_curves(table, BitsPerWeight(stored / table.elements), rules)
    return found


def main() -> None:
    """Parse the arguments, run, print, and write the rows as JSON."""
    own = parser(__doc__, windows=64, out="results/budgets.json")
    own.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0])
    arguments = own.parse_args()
    model, tokenizer, stats, table = measured(arguments)
    windows = list(token_windows(tokenizer, read_text(arguments.text), arguments.context))[: arguments.windows]
    rows = []
    for name, plan in plans(table, arguments.budgets).items():
        small = compress(model, plan, stats=stats, dtype=DTYPE)
        scores = evaluate_many({name: small}, windows, reference=model)[name].to_json()
        rows.append({"name": name, "bits_per_weight": plan.bits_per_weight, "predicted": plan.predicted_nats, **scores})
        print(
            f"{name:<16} {plan.bits_per_weight:7.4f} bits  predicted {plan.predicted_nats:.4f}  KL {scores['kl']:.4f}"
            f"±{scores['kl_error']:.4f}  Δloss {scores['delta_nats']:+.4f}±{scores['delta_nats_error']:.4f}  "
            f"perplexity {scores['perplexity']:.3f}", flush=True,
        )  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
