"""Neurons in another order: the same function, exactly the same numbers moved."""

import pytest
import torch
from torch import nn

from tnc.errors import ModelError, ShapeError
from tnc.models.neurons import permute_neurons


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
