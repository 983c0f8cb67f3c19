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


def test_what_a_layer_loses_is_measured_with_that_layer_alone_replaced():
    """Oracle: KL from the logits of a model put together by hand."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 12), nn.Linear(12, 7))
    stats = {name: LayerStats.from_hessian(torch.eye(size), tokens=50) for name, size in (("1", 8), ("2", 12))}
    windows = [torch.randint(7, (9,)) for _ in range(3)]
    before = [tensor.clone() for tensor in model.parameters()]
    found = sensitivity(model, stats, LowRankStage, [2, 4, 9], windows=windows)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the model is as it was"
    operator = decompose(model[2].weight.detach(), (LowRankStage(4),), stats["2"]).operator
    tokens = torch.stack(windows)
    with torch.no_grad():
        p = model(tokens)[:, :-1].double().log_softmax(-1)
        hidden = model[1](model[0](tokens))
        q = (hidden @ operator.to_dense().T + model[2].bias)[:, :-1].double().log_softmax(-1)
    row = found.rows[4]
    assert row.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    labels = tokens[:, 1:, None]
    assert row.delta_nats == pytest.approx(float((p - q).gather(2, labels).mean()), rel=1e-3, abs=1e-7)
    assert found.rows[5].kl is None and found.grid("kl")[0][0] > found.grid("kl")[0][1] > 0


def test_missing_statistics_are_named(problem):
    with pytest.raises(StatsError, match=r"the statistics lack 1 of 2 layers, the first is '1'"):
        sensitivity(problem[0], {"0": problem[1]["0"]}, LowRankStage, [1])
