"""Every form at equal bits on every linear layer of a model: medians over layers, and how often each form wins.

    python -m benchmarks.forms_of_layers MODEL --stats STATS --jobs 2 --out results/forms.json
    python -m benchmarks.forms_of_layers --table --out results/forms.json

A row of the file is one form of one layer, by `tnc.compare_forms` at ``--share`` of 16 bits a weight. The forms that
are fitted quickly go first, on all layers, so that a run that is cut short has them everywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.layerwise import STATS, WEIGHTS, Row, largest_first, load, measured, parser, read
from tnc.forms.compare import compare_forms
from tnc.forms.contenders import Contender, contenders

ERROR, FIRST = "heldout_relative_error", "truncated SVD"
_SLOW = ("2 cores, int8", "2 cores, int4", "4 Tucker terms", "cp")  # half a minute and more for 512 x 1408 on one core
_SEPARATOR = ": "


def jobs(bits: float) -> list[str]:
    """A layer and a form each; the largest layers of a form first."""
    found = [[_SEPARATOR.join((layer, each.name)) for each in _forms(layer, bits)] for layer in largest_first(WEIGHTS)]
    return sorted((job for layer in found for job in layer), key=lambda job: job.endswith(_SLOW))


def form_row(job: str, *, bits: float) -> Row:
    """Figures of one form of one layer, or why there are none."""
    layer, _, form = job.partition(_SEPARATOR)
    chosen = [each for each in _forms(layer, bits) if each.name == form]
    found = compare_forms(WEIGHTS[layer], STATS[layer], bits=bits, forms=chosen)
    (row,) = found.rows
    if row.report is None:
        return {"shape": list(found.shape), "reason": row.reason}
    report = row.report
    return {
        "shape": list(found.shape), "bits": report.bits_per_weight, "error": report.relative_error,
        ERROR: report.heldout_relative_error, "bound": report.lower_bound, "nats": report.predicted_nats,
        "seconds": report.seconds, "coded": row.coded, "macs_per_token": [cost.macs_per_token for cost in row.costs],
    }  # fmt: skip


def _forms(layer: str, bits: float) -> Sequence[Contender]:
    shape = WEIGHTS[layer].shape
    return contenders((shape[0], shape[1]), bits)


def _family(form: str) -> str:
    """The form without its block numbers, which follow the shape of the layer."""
    return " ".join(word for word in form.split() if "×" not in word)


def table(rows: Mapping[str, Row]) -> Iterator[str]:
    """A line a form, by median nats over the layers that have it, relative to the truncated SVD of the layer.

    A layer is won by the form of fewest nats, among all forms and among those without codes.
    """
    forms: dict[str, dict[str, dict[str, Any]]] = {}
    for job, row in rows.items():
        layer, _, form = job.partition(_SEPARATOR)
        if "reason" not in row:
            forms.setdefault(_family(form), {})[layer] = row
    svd = forms[FIRST]
    ratios = {
        form: statistics.median(row["nats"] / svd[layer]["nats"] for layer, row in found.items() if layer in svd)
        for form, found in forms.items()
    }
    wins = [_winners(forms, coded=coded) for coded in (True, False)]
    yield f"{len(svd)} layers\n"
    yield "| form | layers | bits/weight | H-error | held out | nats, times SVD's | best of all | best without codes |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for form in sorted(forms, key=ratios.__getitem__):
        found = list(forms[form].values())
        bits, error, heldout = (statistics.median(row[key] for row in found) for key in ("bits", "error", ERROR))
        counts = " | ".join(str(won.count(form)) for won in wins)
        yield f"| {form} | {len(found)} | {bits:.2f} | {error:.4f} | {heldout:.4f} | {ratios[form]:.2f} | {counts} |"


def _winners(forms: Mapping[str, Mapping[str, Row]], *, coded: bool) -> list[str]:
    """The form of fewest nats of every layer."""
    found = []
    for layer in forms[FIRST]:
        rows = {form: each[layer] for form, each in forms.items() if layer in each}
        found.append(
            min((form for form, row in rows.items() if coded or not row["coded"]), key=lambda f: rows[f]["nats"])
        )
    return found


def main() -> None:
    """Measure what the file lacks and print the table."""
    arguments = parser(__doc__, "results/forms.json").parse_args()
    bits = 16 * arguments.share
    if not arguments.table:
        load(arguments)
        measured(arguments, jobs(bits), partial(form_row, bits=bits))
    print("\n".join(table(read(arguments.out)["rows"])))


if __name__ == "__main__":
    main()
