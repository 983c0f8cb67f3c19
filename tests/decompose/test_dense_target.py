"""The asymmetric target: the best map from compressed inputs to dense outputs, before anything is rounded."""

import pytest
import torch

import tnc
from tnc.decompose import DenseStage, DenseTarget, QuantizeStage, decompose
from tnc.errors import StatsError
from tnc.formats import IntFormat
from tnc.stats import LayerStats, MomentsAccumulator
from tnc.terms import dense64


def paired(seed=0, rows=6, columns=10, tokens=200, noise=0.5):
    """A weight, its dense and compressed inputs (tokens, n), and the statistics with their cross moment."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    behind = x + noise * torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix.T
    sums = MomentsAccumulator(columns)
    sums.add(behind, x)
    return weight, x, behind, LayerStats(sums.moments())


def test_target_is_the_least_squares_solution():
    weight, x, behind, stats = paired()
    found = DenseTarget(damping=0.0).apply(weight, stats).weight
    best = torch.linalg.lstsq(behind, x @ weight.T).solution.T
    assert torch.allclose(found, best, atol=1e-10)
    half = DenseTarget(strength=0.5, damping=0.0).apply(weight, stats).weight
    assert torch.allclose(half, (weight + best) / 2, atol=1e-10)
    assert torch.allclose(DenseTarget(strength=0).apply(weight, stats).weight, weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantized_layers_come_closer_to_the_dense_outputs(bits):
    gains = []
    for seed in range(6):
        weight, x, behind, stats = paired(seed, 16, 24, 400)
        stage = [QuantizeStage(IntFormat(bits, 8))]
        errors = [
            float((x @ weight.T - behind @ dense64(decompose(weight, stage, stats, transforms=t).operator).T).norm())
            for t in ((DenseTarget(),), ())
        ]
        gains.append(errors[0] / errors[1])
    assert max(gains) < 1
    assert sum(gains) / len(gains) < 0.9


def test_without_a_cross_moment_nothing_changes_and_the_report_says_so():
    weight, _, _, stats = paired()
    note = "no cross moment of dense and compressed inputs: the target is the weight itself"
    plain = LayerStats.from_hessian(stats.hessian, tokens=9)
    for known in (plain, None):
        result = decompose(weight, [DenseStage()], known, transforms=(DenseTarget(),))
        assert torch.equal(dense64(result.operator), weight)
        assert note in result.report.fallbacks
    same = LayerStats(type(stats.inputs)(stats.hessian, None, 9, stats.hessian))
    assert torch.allclose(DenseTarget().apply(weight, same).weight, weight)


def test_dead_inputs_leave_the_weight_alone():
    zero = torch.zeros(4, 4, dtype=torch.float64)
    stats = LayerStats(tnc.Moments(zero, None, 9, zero))
    weight = torch.ones(2, 4)
    assert torch.equal(DenseTarget().apply(weight, stats).weight, weight.double())


def test_errors():
    with pytest.raises(StatsError, match=r"DenseTarget\(strength=2, damping=0.01\) needs 0 <= strength <= 1"):
        DenseTarget(strength=2)
    singular = torch.ones(4, 4, dtype=torch.float64)
    stats = LayerStats(tnc.Moments(singular, None, 9, 2 * singular))
    with pytest.raises(StatsError, match=r"H \+ 0 mean\(diag H\) I is not positive definite; raise DenseTarget"):
        DenseTarget(damping=0.0).apply(torch.ones(2, 4), stats)
