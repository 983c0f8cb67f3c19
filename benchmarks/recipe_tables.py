"""Tables of rows of `benchmarks.recipes`, filled into a page.

    python -m benchmarks.recipe_tables --add results/recipes.json --calib books-unseen
    python -m benchmarks.recipe_tables

The first line takes the rows of files into ``benchmarks/rows/recipes.csv`` (`benchmarks.kept_rows`), the second makes
every table between the marks ``<!-- table: NAME MODEL -->`` and ``<!-- end -->`` of ``docs/recipes.md`` anew. A cell is
the mean over seeds ± their standard deviation.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.kept_rows import PATH, Found, add, load, save
from benchmarks.results import mean_and_spread, read

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"

_MARK = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_BITS = (2, 3, 4)
_AIMS = {2: 0.21, 3: 0.035, 4: 0.007}  # nats above dense
_AIMED = ("best_at_bits", "yaqa_trellis_lr", "yaqa_trellis")
_TEXTS = ("books-unseen", "books-train")
_STEPS = (  # what it is, the recipe, the recipe without it
    ("two-sided rounding", "yaqa", "gptq"),
    ("refinement of codes and scales", "gptq_refined", "gptq"),
    ("rotation of both sides", "quip", "gptq"),
    ("4-bit factors", "qlr_fisher", "gptq"),
    ("refinement after two-sided rounding", "yaqa_refined", "yaqa"),
    ("rotation before two-sided rounding", "yaqa_rotated", "yaqa"),
    ("both", "yaqa_rotated_refined", "yaqa"),
    ("trellis for integers, rotated, in H alone", "qtip", "quip"),
    ("trellis for refined integers, rotated, two-sided", "yaqa_trellis", "yaqa_rotated_refined"),
    ("two-sided rounding on a trellis", "yaqa_trellis", "qtip"),
    ("4-bit factors beside that", "yaqa_trellis_lr", "yaqa_trellis"),
    ("more states of the trellis", "best_at_bits", "yaqa_trellis_lr"),
    ("all together", "best_at_bits", "gptq"),
)


def comparison(rows: Sequence[Found]) -> Iterator[str]:
    """All recipes, one table a width, by KL."""
    for bits in _BITS:
        yield f"### About {bits + (16 + bits) / 64:.2f} bits\n"
        yield "| recipe | seeds | bits/weight | held-out error | predicted nats | KL | Δloss | perplexity |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        groups = {name: _of(rows, name, bits) for name in dict.fromkeys(row["recipe"] for row in rows)}
        for name, each in sorted(((n, e) for n, e in groups.items() if e), key=lambda group: _mean(group[1], "kl")):
            figures = " | ".join(_cell(each, key) for key in ("heldout", "predicted_nats", "kl", "delta_nats"))
            stored = f"{_mean(each, 'bits_per_weight'):.3f}"
            yield f"| `{name}` | {len(each)} | {stored} | {figures} | {_cell(each, 'perplexity', 2)} |"
        yield ""


def steps(rows: Sequence[Found]) -> Iterator[str]:
    """What each step takes off the KL and the loss of the recipe without it, over the seeds that both have."""
    yield "| step | recipe | without it | bits | KL | KL without | change | Δloss | Δloss without |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for what, name, before in _STEPS:
        here, there = zip(*(_paired(_of(rows, name, bits), _of(rows, before, bits)) for bits in _BITS), strict=True)
        if any(here):
            pairs = zip(here, there, strict=True)
            changes = (f"{100 * (_mean(a, 'kl') / _mean(b, 'kl') - 1):+.0f} %" if a else "–" for a, b in pairs)
            change = " / ".join(changes)
            cells = " | ".join((*(_three(e, "kl", 4) for e in (here, there)), change,
                                *(_three(e, "delta_nats", 4) for e in (here, there))))  # fmt: skip
            yield f"| {what} | `{name}` | `{before}` | {_three(here, 'bits_per_weight', 2)} | {cells} |"


def aims(rows: Sequence[Found]) -> Iterator[str]:
    """Nats above dense of every seed beside the aims; ± is the standard error over the windows of the text."""
    yield "| aim | recipe | bits/weight | Δloss of every seed (± of the text) | mean |"
    yield "| --- | --- | --- | --- | --- |"
    for bits in _BITS:
        for name in _AIMED:
            each = sorted(_of(rows, name, bits), key=lambda row: row["seed"])
            if each:
                cells = ", ".join(f"+{row['delta_nats']:.4f} ± {row['delta_nats_error']:.4f}" for row in each)
                stored, mean = f"{_mean(each, 'bits_per_weight'):.3f}", f"+{_mean(each, 'delta_nats'):.4f}"
                yield f"| +{_AIMS[bits]:g} | `{name}` | {stored} | {cells} | {mean} |"


def texts(rows: Sequence[Found]) -> Iterator[str]:
    """The same recipes with statistics of new text and of text that the model was trained on."""
    yield "| recipe | bits | KL, new text | KL, trained text | Δloss, new | trained | KL/nats, new | trained |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for bits in _BITS:
        for name in dict.fromkeys(row["recipe"] for row in rows if row["calib"] == _TEXTS[1]):
            both = _paired(*(_of(rows, name, bits, text) for text in _TEXTS))
            if both[0]:
                cells = " | ".join(_cell(each, key) for key in ("kl", "delta_nats") for each in both)
                ratios = " | ".join(f"{_mean(each, 'kl') / _mean(each, 'predicted_nats'):.2f}" for each in both)
                yield f"| `{name}` | {_mean(both[0], 'bits_per_weight'):.2f} | {cells} | {ratios} |"


_TABLES: dict[str, Callable[[Sequence[Found]], Iterator[str]]] = {
    "comparison": comparison, "steps": steps, "aims": aims, "texts": texts,
}  # fmt: skip


def filled(page: str, rows: Sequence[Found]) -> str:
    """The page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        begin, name, model, end = match.groups()
        lines = _TABLES[name]([row for row in rows if row["model"] == model])
        return begin + "\n".join(lines).strip("\n") + "\n" + end

    return _MARK.sub(table, page)


def _of(rows: Sequence[Found], name: str, bits: int, calib: str = _TEXTS[0]) -> list[Found]:
    return [row for row in rows if (row["recipe"], row["bits"], row["calib"]) == (name, bits, calib)]


def _paired(some: Sequence[Found], others: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """The rows of seeds that both have."""
    seeds = {row["seed"] for row in some} & {row["seed"] for row in others}
    return [row for row in some if row["seed"] in seeds], [row for row in others if row["seed"] in seeds]


def _mean(rows: Sequence[Found], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _cell(rows: Sequence[Found], key: str, digits: int = 4) -> str:
    return mean_and_spread([row[key] for row in rows], digits, "+" if key == "delta_nats" else "")


def _three(widths: Sequence[Sequence[Found]], key: str, digits: int) -> str:
    return " / ".join(f"{_mean(each, key):.{digits}f}" if each else "–" for each in widths)


def main() -> None:
    """Parse the arguments; keep rows, or fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="+", help="files of benchmarks.recipes")
    parser.add_argument("--model", help="of files that do not name it")
    parser.add_argument("--calib", default=_TEXTS[0], help="name of the calibration text of these files")
    parser.add_argument("--rows", type=Path, default=PATH)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if arguments.add:
        new = [
            {"model": file.get("model", arguments.model), "calib": arguments.calib, **row}
            for file in map(read, arguments.add)
            for row in file["rows"]
        ]
        save(add(load(arguments.rows), new), arguments.rows)
    else:
        arguments.page.write_text(filled(arguments.page.read_text(), load(arguments.rows)))


if __name__ == "__main__":
    main()
