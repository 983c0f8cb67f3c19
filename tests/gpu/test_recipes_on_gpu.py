"""Every recipe takes a layer on the GPU and keeps it there, with the error that it has on the CPU."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from decompose.test_recipes import build
from strategies_matrices import well_conditioned

from tnc import LayerStats, Moments
from tnc.decompose import RECIPES
from tnc.decompose.best import decompose_by
from tnc.errors import StatsError

PROBLEM = well_conditioned(48, 64, 0, fisher=True)
ROUGHLY = 0.05  # codes near a border, and starts drawn on the device, fall to the other side


def moved(moments: Moments | None) -> Moments | None:
    if moments is None:
        return None
    mean_abs = None if moments.mean_abs is None else moments.mean_abs.cuda()
    return Moments(moments.second.cuda(), mean_abs, moments.tokens)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("fisher", [True, False])
def test_a_layer_stays_on_the_gpu(name, fisher):
    stats = (PROBLEM if fisher else well_conditioned(48, 64, 0, fisher=False)).stats()
    there = LayerStats(moved(stats.inputs), moved(stats.heldout), moved(stats.gradient))
    try:
        expected = decompose_by(PROBLEM.weight, build(name), stats).report
    except StatsError:
        pytest.skip("needs gradients")
    found = decompose_by(PROBLEM.weight.cuda(), build(name), there)
    assert all(tensor.is_cuda for tensor in found.operator.tensors().values())
    assert found.report.storage_bits == expected.storage_bits
    error = "predicted_nats" if fisher else "relative_error"
    assert getattr(found.report, error) == pytest.approx(getattr(expected, error), rel=ROUGHLY)


@pytest.mark.parametrize("name", ["rtn", "svd", "lorc"])
def test_a_layer_without_statistics_stays_there_too(name):
    found = decompose_by(PROBLEM.weight.cuda(), build(name), None)
    assert all(tensor.is_cuda for tensor in found.operator.tensors().values())
