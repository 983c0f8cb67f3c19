"""The rotation in one launch, against the dense rotation in float64, on every sort of size."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE, ROUNDING, inputs

from tnc.kernels import hadamard as row
from tnc.kernels.applied import applied
from tnc.terms import Hadamard

pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


def rotation(size, inverse=False):
    found = Hadamard.random(size, seed=3)
    found = Hadamard(found.signs.to(DEVICE), size, found.factors, False)
    return found.inverse() if inverse else found


def run(term, x):
    return row.hadamard(x, term.signs, term.factors, term.transposed)


@pytest.mark.parametrize("size", [1, 2, 12, 13, 20, 26, 64, 156, 172, 240, 344, 768])
@pytest.mark.parametrize("inverse", [False, True])
def test_sizes(size, inverse):
    term, x = rotation(size, inverse), inputs(3, size, torch.float16)
    y, exact = run(term, x), x.double() @ term.to_dense().T
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= 2 * ROUNDING[torch.float16] * exact.abs() + 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    term, x = rotation(96), inputs(2, 96, dtype)
    exact = x.double() @ term.to_dense().T
    assert (run(term, x).double() - exact).norm() <= {**ROUNDING, torch.float64: 1e-14}[dtype] * exact.norm()


def test_the_inverse_undoes_it_and_no_tokens_are_none():
    x = inputs(2, 416, torch.float32)
    torch.testing.assert_close(run(rotation(416, True), run(rotation(416), x)), x, rtol=0, atol=2e-5)
    assert run(rotation(416), x[:0]).shape == (0, 416)


def test_sides_are_balanced_and_bounded():
    sizes = {4096: (64, 64), 11008: (64, 172), 14336: (128, 112), 53248: (256, 208), 2: (1, 2), 1: (1, 1)}
    for size, expected in sizes.items():
        left, right = row.sides(Hadamard.random(size).factors)
        assert sorted(map(_product, (left, right))) == sorted(expected)
    assert row.sides((2**20,)) is None
    x = inputs(1, 2 * 131072, torch.float32)
    term = Hadamard.random(2 * 131072)
    assert torch.equal(row.hadamard(x.cpu(), term.signs, term.factors, False), term.linear(x.cpu()))


def _product(factors):
    return int(torch.tensor(factors, dtype=torch.int64).prod()) if factors else 1


def test_gradients_and_the_operator():
    term = rotation(24)
    x = inputs(2, 24, torch.float32).requires_grad_()
    seed = inputs(2, 24, torch.float32, seed=4)
    (got,) = torch.autograd.grad(run(term, x), x, seed)
    torch.testing.assert_close(got, (seed.double() @ term.to_dense()).float(), rtol=0, atol=1e-5)
    torch.library.opcheck(row.hadamard, (x, term.signs, list(term.factors), False))


def test_leaves_on_a_gpu_take_it(monkeypatch):
    term = Hadamard.random(8)
    plan = applied(term, "", 1)
    seen = []
    monkeypatch.setitem(row.FUSED, "hadamard", lambda spec, tensors, x: seen.append(spec["factors"]) or x)

    class Cuda(torch.Tensor):
        device = torch.device("cuda")

    plan(torch.ones(1, 8).as_subclass(Cuda), term.tensors())
    assert seen == [[8]]
    assert torch.equal(plan(torch.ones(1, 8), term.tensors()), term.linear(torch.ones(1, 8)))
