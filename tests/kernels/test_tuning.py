"""Tuning: candidates from the tables, answers compared, time bounded, what is found is used."""

import json

import pytest
import torch

from tnc.errors import BackendError
from tnc.kernels import tuned, tuning
from tnc.kernels.tuning import Problem, tune

CPU = torch.device("cpu")
TILES = [{"rows": 8 * i} for i in range(1, 6)]
SIZES = {"rows": 64, "columns": 64, "tokens": 1}


@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path):
    """A shipped table of one kernel with five tiles, the nearest shape's first, and a cache folder."""
    rows = [{"kernel": "k", **SIZES, "rows": 64 << i, "tile": tile, "microseconds": 1} for i, tile in enumerate(TILES)]
    monkeypatch.setattr(tuned, "table", lambda name: {"rows": [*rows, rows[0]]})
    monkeypatch.setattr(tuned, "own_table", lambda device: tmp_path / "tiles-gpu.json")
    tuned.forget()
    yield
    tuned.forget()


class Clock:
    """Time that passes by itself: a second a launch, and what a tile is said to take."""

    def __init__(self, times):
        self.times, self.seconds, self.order = times, 0.0, []

    def __call__(self, call):
        call()
        tile = tuned.tuned("k", CPU, **SIZES)
        self.order.append(tile["rows"])
        self.seconds += 1
        return self.times[tile["rows"]]

    def now(self):
        return self.seconds


def problem(wrong=()):
    def launch():
        return torch.full((3,), 1.0 + (tuned.tuned("k", CPU, **SIZES)["rows"] in wrong))

    return Problem("k", SIZES, lambda: launch)


def test_the_fastest_tile_is_found_nearest_shapes_first():
    clock = Clock({8: 5.0, 16: 4.0, 24: 2.0, 32: 3.0, 40: 9.0})
    seen = []
    (found,) = tune([problem()], CPU, clock, seconds=100, now=clock.now, progress=lambda *step: seen.append(step))
    assert clock.order == [8, 16, 24, 32, 40] and seen == [("kernels", 1, 1)]
    assert found.row == {"kernel": "k", **SIZES, "tile": {"rows": 24}, "microseconds": 2.0}
    assert (found.timed, found.of, found.wrong) == (5, 5, 0)


def test_a_tile_with_another_answer_is_not_timed():
    clock = Clock({8: 5.0, 16: 1.0, 24: 4.0, 32: 6.0, 40: 7.0})
    (found,) = tune([problem(wrong=(16,))], CPU, clock, seconds=100, now=clock.now)
    assert found.row["tile"] == {"rows": 24} and found.wrong == 1 and 16 not in clock.order


@pytest.mark.parametrize(("seconds", "timed"), [(0.0, [1, 1, 1]), (6.0, [2, 2, 2]), (7.0, [3, 2, 2])])
def test_time_is_shared_and_the_first_tile_always_timed(seconds, timed):
    clock = Clock({8 * i: float(i) for i in range(1, 6)})
    found = tune([problem()] * 3, CPU, clock, seconds=seconds, now=clock.now)
    assert [each.timed for each in found] == timed and clock.seconds <= max(seconds, 3) + 2


def test_what_was_found_is_used_and_tuned_further(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert tuned.tuned("k", CPU, **SIZES) == {"rows": 8}
    clock = Clock({8: 5.0, 16: 4.0, 24: 2.0, 32: 3.0, 40: 9.0})
    path = tuning.save(tune([problem()], CPU, clock, seconds=100, now=clock.now), CPU)
    held = json.loads(path.read_text())
    assert held["gpu"] == "a GPU" and held["date"] and held["rows"][0]["tile"] == {"rows": 24}
    assert tuned.tuned("k", CPU, **SIZES) == {"rows": 24} and tuned.predicted("k", CPU, **SIZES) == 2.0
    assert tuned.tiles("k", CPU, **SIZES)[0] == {"rows": 24} and len(tuned.tiles("k", CPU, **SIZES)) == 5


def test_a_tile_is_tried_only_within():
    with tuned.trying("k", {"rows": 99}):
        assert tuned.tuned("k", CPU, **SIZES) == {"rows": 99}
    assert tuned.tuned("k", CPU, **SIZES) == {"rows": 8}


def test_without_a_gpu_or_triton_it_is_said(monkeypatch):
    with pytest.raises(BackendError, match="got device cpu; only tiles of the fused kernels are tuned"):
        tuning.problems(CPU)
    monkeypatch.setattr(tuning, "_BUILDERS", [])
    with pytest.raises(BackendError, match=r"needs Triton.*pip install tnc\[triton\]"):
        tuning.problems(torch.device("cuda"))
