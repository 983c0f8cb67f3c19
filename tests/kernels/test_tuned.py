"""Tuned tiles are data: every kernel has some, and the model made of them orders what was measured."""

from itertools import combinations

import pytest
import torch

from tnc.kernels import tuned as module
from tnc.kernels.tuned import SIZES, predicted, table, tuned

KERNELS = [
    "qlr_vector", "qlr_tile", "rebuild_qlr", "low_rank_vector", "low_rank_tile", "mpo2", "mpo3", "rebuild_mpo2",
    "experts_tile", "experts_vector", "trellis_vector", "trellis_tile", "rebuild_trellis",
]  # fmt: skip
TIMED = [row for row in table("h200")["rows"] if "microseconds" in row]


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(module, "_file", lambda device: "h200")
    module.forget()
    yield
    module.forget()


def sizes(row):
    return {key: row.get(key, 0) for key in SIZES}


@pytest.mark.parametrize("name", ["h200", "interpreter"])
def test_a_table_says_where_and_when_and_knows_every_kernel(name):
    held = table(name)
    assert held["gpu"] and held["date"]
    assert {row["kernel"] for row in held["rows"]} == set(KERNELS)
    for kernel in KERNELS:
        keys = {frozenset(row["tile"]) for row in held["rows"] if row["kernel"] == kernel}
        assert len(keys) == 1, "rows of one kernel name the same tile parameters"


def test_a_measured_shape_gets_its_own_tile_and_time(h200):
    for row in TIMED:
        assert tuned(row["kernel"], torch.device("cpu"), **sizes(row)) == row["tile"]
        assert predicted(row["kernel"], torch.device("cpu"), **sizes(row)) == row["microseconds"]


def test_a_shape_left_out_is_predicted_from_the_others(h200, monkeypatch):
    """Each pair of shapes of one kernel that differ in rows or columns only, one predicted from the other."""
    found = []
    for row, other in combinations(TIMED, 2):
        same = ("kernel", "rank", "bits", "tokens")
        if all(row.get(key) == other.get(key) for key in same):
            ratio = sizes(other)["rows"] * sizes(other)["columns"] / (sizes(row)["rows"] * sizes(row)["columns"])
            found.append(row["microseconds"] * (0.25 + 0.75 * ratio) / other["microseconds"])
    assert len(found) >= 10
    within = sum(2 / 3 < each < 3 / 2 for each in found) / len(found)
    assert within >= 0.6, sorted(found)


def test_the_model_chooses_the_measured_winner(h200):
    """One token: FMA at every measured shape; two tokens at 14336 x 4096: tensor cores (25.9 against 17.2 us)."""
    for rows, tokens, fma in [(4096, 1, True), (14336, 1, True), (4096, 2, True), (14336, 2, False)]:
        at = {"rows": rows, "columns": 4096, "rank": 64, "bits": 4, "tokens": tokens}
        times = [predicted(kernel, torch.device("cpu"), **at) for kernel in ("qlr_vector", "qlr_tile")]
        assert (times[0] <= times[1]) is fma


def test_a_row_without_a_time_lends_its_tile_and_no_time(h200, monkeypatch):
    rows = [
        {"kernel": "a", "rows": 64, "columns": 64, "tile": {"warps": 2}},
        {"kernel": "a", "rows": 128, "columns": 64, "tile": {"warps": 4}, "microseconds": 8.0},
        {"kernel": "b", "rows": 64, "columns": 64, "tile": {"warps": 8}},
    ]
    monkeypatch.setattr(module, "_rows", lambda kernel, _: [row for row in rows if row["kernel"] == kernel])
    module.forget()
    at = {"rows": 64, "columns": 64}
    assert tuned("a", torch.device("cpu"), **at) == {"warps": 2}
    assert predicted("a", torch.device("cpu"), **at) == 8.0 * (0.25 + 0.75 / 2)
    assert predicted("b", torch.device("cpu"), **at) is None
