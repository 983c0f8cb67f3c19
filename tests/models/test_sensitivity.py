"""The profile of a model is what `decompose` says of each layer alone."""

import pytest
import torch
from torch import nn

from tnc.decompose import BitsPerWeight, LowRankStage, decompose
from tnc.errors import StatsError
from tnc.models.sensitivity import label, sensitivity
from tnc.stats import LayerStats


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    stats = {}
    for name, size in (("0", 8), ("1", 12)):
        x = torch.randn(50, size, dtype=torch.float64)
        stats[name] = LayerStats.from_hessian(x.T @ x / 50, tokens=50)
    return model, stats


def test_rows_are_what_decompose_says(problem):
    model, stats = problem
    seen = []
    found = sensitivity(model, stats, LowRankStage, [2, BitsPerWeight(16), 7, 4], progress=lambda *a: seen.append(a))
    assert found.layers == ("0", "1") and found.sizes == ("2", "BitsPerWeight 16", "7", "4")
    expected = decompose(model[1].weight.detach(), (LowRankStage(2),), stats["1"]).report
    row = found.rows[4]
    assert (row.layer, row.relative_error, row.predicted_nats) == ("1", expected.relative_error, None)
    errors = found.grid("relative_error")
    assert errors[1][2] is None, "rank 7 does not exist for 6 x 12"
    assert errors[0][2] is None, "rank 7 is above the useful limit of 12 x 8"
    assert errors[0][3] < errors[0][0]
    assert seen[-1] == ("sensitivity", 8, 8) and found.to_json()["rows"][4]["layer"] == "1"
    assert label(3) == "3"


def test_missing_statistics_are_named(problem):
    with pytest.raises(StatsError, match=r"the statistics lack 1 of 2 layers, the first is '1'"):
        sensitivity(problem[0], {"0": problem[1]["0"]}, LowRankStage, [1])
