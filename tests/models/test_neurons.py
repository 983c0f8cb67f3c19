"""Neurons in another order: the same function, exactly the same numbers moved."""

import pytest
import torch
from torch import nn

from tnc.decompose import MpoStage
from tnc.errors import ModelError, ShapeError
from tnc.metric import Metric
from tnc.models.neurons import neuron_order, permute_neurons
from tnc.networks import tt_svd
from tnc.testing import make_problem


class Mlp(nn.Module):
    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(6, 10, bias=bias), nn.Linear(6, 10, bias=bias)
        self.down_proj = nn.Linear(10, 6, bias=bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("bias", [False, True])
def test_the_function_is_the_same_and_the_inverse_undoes_it(bias):
    mlp, x = Mlp(bias).double(), torch.randn(7, 6, dtype=torch.float64)
    before, output = {k: v.clone() for k, v in mlp.state_dict().items()}, mlp(x)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    permute_neurons(mlp, order)
    torch.testing.assert_close(mlp(x), output, rtol=1e-12, atol=1e-12)
    assert torch.equal(mlp.up_proj.weight, before["up_proj.weight"][order])
    assert torch.equal(mlp.down_proj.weight, before["down_proj.weight"][:, order])
    permute_neurons(mlp, torch.argsort(order))
    assert all(torch.equal(v, before[k]) for k, v in mlp.state_dict().items())


def test_mistakes_are_explained():
    with pytest.raises(ShapeError, match=r"expected each of 0 .. 9 once"):
        permute_neurons(Mlp(False), torch.zeros(10, dtype=torch.long))
    with pytest.raises(ModelError, match=r"Mlp has no linear layer 'fc1'"):
        permute_neurons(Mlp(False), torch.arange(10), names=(("fc1",), "down_proj"))


def test_an_order_of_neurons_is_the_shared_order_of_its_layers():
    """It lowers the priced error of the three two-core operators after `permute_neurons`, or leaves the MLP alone."""
    torch.manual_seed(1)
    mlp = nn.Module()
    mlp.gate_proj, mlp.up_proj = nn.Linear(12, 24, bias=False), nn.Linear(12, 24, bias=False)
    mlp.down_proj = nn.Linear(24, 12, bias=False)
    shuffled = torch.randperm(24)
    with torch.no_grad():  # Kronecker products of the modes, their neurons out of order
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight.copy_(torch.kron(torch.randn(4, 4), torch.randn(6, 3))[shuffled])
        mlp.down_proj.weight.copy_(torch.kron(torch.randn(3, 6), torch.randn(4, 4))[:, shuffled])
    sizes = {"gate_proj": (24, 12), "up_proj": (24, 12), "down_proj": (12, 24)}
    stats = {
        n: make_problem(s, hessian="full", gradient="full", seed=k).stats for k, (n, s) in enumerate(sizes.items())
    }

    def error(moved):
        total = [0.0, 0.0]
        for name in sizes:
            weight, metric = getattr(mlp, name).weight.detach().double(), Metric.auto(stats[name])
            g, h = metric.gradient.diagonal().sqrt(), metric.hessian.diagonal().sqrt()
            g, h = (g, h[moved]) if name == "down_proj" else (g[moved], h)
            scaled = g[:, None] * weight * h
            fitted = tt_svd(scaled, *MpoStage(2).modes(sizes[name]), max_rank=2)
            total[0] += float((scaled - fitted.to_dense()).square().sum())
            total[1] += float(scaled.square().sum())
        return (total[0] / total[1]) ** 0.5

    weights = {name: getattr(mlp, name).weight.detach() for name in sizes}
    found = neuron_order(weights, stats, 2, rounds=10)
    assert found.before == pytest.approx(error(torch.arange(24)), rel=1e-5) and found.after < found.before
    permute_neurons(mlp, found.rows)
    assert found.after == pytest.approx(error(found.rows), rel=1e-5)
