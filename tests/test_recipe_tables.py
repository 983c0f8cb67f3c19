"""The tables of docs/recipes.md are those of the rows that are kept."""

import importlib
from pathlib import Path

from tnc import RECIPES

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_holds_the_tables_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    tables, kept = (importlib.import_module(f"benchmarks.{name}") for name in ("recipe_tables", "kept_rows"))
    page = tables.PAGE.read_text()
    assert page.count("<!-- table: ") >= 6
    assert tables.filled(page, kept.load()) == page


def test_rows_of_the_same_recipe_bits_and_seed_are_replaced(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    kept = importlib.import_module("benchmarks.kept_rows")
    key = {"model": "m", "calib": "c", "recipe": "gptq", "options": "gptq(bits=2, group_size=64)", "bits": 2}
    rows = [{**key, "seed": seed, "kl": kl} for seed, kl in ((1, 0.5), (0, 0.25), (1, 0.125))]
    path = tmp_path / "rows" / "recipes.csv"
    kept.save(kept.add((), rows), path)
    assert kept.load(path) == [{**key, "seed": 0, "kl": 0.25}, {**key, "seed": 1, "kl": 0.125}]


def test_every_recipe_that_quantizes_has_rows_at_every_width(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    rows = list(importlib.import_module("benchmarks.recipe_rows").rows([2, 3, 4]))
    named = {name for name, entry in RECIPES.items() if "bits" in entry.options} | {"best_at_bits"}
    assert {row.recipe.name for row in rows} == named
    assert len(rows) == 3 * len(named)
    assert {row.recipe.name for row in rows if row.needs_text} == {"gptaq", "yaqa_dense_target", "autoround_blocks"}
