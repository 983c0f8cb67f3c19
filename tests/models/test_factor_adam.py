"""The update of all factors at once is that of torch's AdamW, one group a factor."""

import pytest
import torch
from torch import nn

from tnc.models.factor_adam import BETAS, FactorAdam


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_adam_with_a_rate_for_every_factor(dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (1, 2, 5, 3), (7,), (0, 4)]
    start = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    mine, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    rates = [0.1, 1e-3, 3.0, 1.0]
    optimizer = FactorAdam(
        {str(k): p for k, p in enumerate(mine)}, {str(k): rate for k, rate in enumerate(rates)}
    )  # fmt: skip
    groups = [{"params": [p], "lr": rate, "whole": rate} for p, rate in zip(theirs, rates, strict=True)]
    oracle = torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS, eps=1e-8)
    for share in (0.2, 1.0, 0.7, 0.1):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.clone()
        optimizer.step(share)
        for group in oracle.param_groups:
            group["lr"] = group["whole"] * share
        oracle.step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_a_factor_without_gradient_stays_until_it_has_one():
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FactorAdam({"one": one, "two": two}, {"one": 0.1, "two": 0.1})
    one.grad = torch.ones(3)
    optimizer.step(1.0)
    assert torch.allclose(one, torch.full((3,), 0.9)) and torch.equal(two, torch.ones(3))
