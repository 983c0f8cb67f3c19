"""Every form at equal bits on every linear layer of a model: medians over layers, and how often each form wins.

    python -m benchmarks.forms_of_layers MODEL --stats STATS --jobs 2 --out results/forms.json
    python -m benchmarks.forms_of_layers --table --out results/forms.json

Each row of the file is `tnc.compare_forms` of a layer at ``--share`` of 16 bits a weight.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.layerwise import STATS, WEIGHTS, Row, load, measured, parser, read
from tnc.forms.compare import compare_forms

ERROR = "heldout_relative_error"


def layer_row(name: str, *, bits: float) -> Row:
    """Figures of every form of one layer, by name of the form."""
    found = compare_forms(WEIGHTS[name], STATS[name], bits=bits)
    forms: dict[str, Any] = {}
    for row in found.rows:
        if row.report is None:
            forms[row.form] = {"reason": row.reason}
            continue
        report = row.report
        forms[row.form] = {
            "bits": report.bits_per_weight, "error": report.relative_error, ERROR: report.heldout_relative_error,
            "bound": report.lower_bound, "nats": report.predicted_nats, "seconds": report.seconds,
            "macs_per_token": [cost.macs_per_token for cost in row.costs],
        }  # fmt: skip
    return {
        "shape": list(found.shape), "forms": forms, "measure": found.measure, "winner": found.winner.form,
        "structured": found.structured_winner.form,
    }  # fmt: skip


def _family(form: str) -> str:
    """The form without its block numbers, which follow the shape of the layer."""
    return " ".join(word for word in form.split() if "×" not in word)


def table(rows: Mapping[str, Row]) -> Iterator[str]:
    """A line a form, by median nats over the layers that have it, relative to the truncated SVD of the layer."""
    yield "| form | layers | bits/weight | H-error | held out | nats, times SVD's | best of all | best without codes |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    forms: dict[str, list[tuple[dict[str, Any], Row]]] = {}
    for row in rows.values():
        for name, each in row["forms"].items():
            if "reason" not in each:
                forms.setdefault(_family(name), []).append((each, row))

    def ratio(pairs: list[tuple[dict[str, Any], Row]]) -> float:
        return statistics.median(each["nats"] / row["forms"]["truncated SVD"]["nats"] for each, row in pairs)

    for name, pairs in sorted(forms.items(), key=lambda item: ratio(item[1])):
        bits, error, heldout = (statistics.median(each[key] for each, _ in pairs) for key in ("bits", "error", ERROR))
        wins = [sum(_family(row[key]) == name for row in rows.values()) for key in ("winner", "structured")]
        yield (
            f"| {name} | {len(pairs)} | {bits:.2f} | {error:.4f} | {heldout:.4f} | {ratio(pairs):.2f} | "
            f"{wins[0]} | {wins[1]} |"
        )


def main() -> None:
    """Measure what the file lacks and print the table."""
    arguments = parser(__doc__, "results/forms.json").parse_args()
    if not arguments.table:
        load(arguments)
        measured(arguments, list(WEIGHTS), partial(layer_row, bits=16 * arguments.share))
    print("\n".join(table(read(arguments.out)["rows"])))


if __name__ == "__main__":
    main()
