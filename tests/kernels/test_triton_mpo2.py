"""Two-core MPOs in one launch, and rebuilt: against the definition in float64, on odd modes."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE, Case, answer, check, inputs, low_rank

from tnc.kernels import mpo2 as row
from tnc.terms import Mpo

HALF = torch.float16


pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


def mpo(o1, i1, o2, i2, bond, *, dtype=HALF, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = (torch.randn(1, o1, i1, bond, generator=generator) / (i1 * bond) ** 0.5).to(dtype)
    second = (torch.randn(bond, o2, i2, 1, generator=generator) / i2**0.5).to(dtype)
    matrix = torch.einsum("yaid,dbjz->abij", first.double(), second.double()).reshape(o1 * o2, i1 * i2)
    return Case(Mpo((first.to(DEVICE), second.to(DEVICE))), matrix.to(DEVICE))


MODES = [(6, 5, 7, 9, 4), (16, 16, 16, 16, 8), (1, 3, 17, 33, 5), (20, 2, 1, 1, 3), (3, 1, 2, 30, 1)]


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("modes", MODES)
def test_modes(modes, tokens):
    check(row, mpo(*modes), inputs(tokens, modes[1] * modes[3], HALF))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    check(row, mpo(6, 5, 7, 9, 4, dtype=dtype), inputs(3, 45, dtype))


@pytest.mark.parametrize("modes", MODES)
def test_the_rebuilt_matrix(modes, monkeypatch):
    case = mpo(*modes)
    first, second = case.operator.cores
    for held in (first, first.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):  # as stored, as modules hold it
        weight = row.rebuild(held, second)
        assert (weight.double() - case.matrix).norm() <= 2e-3 * case.matrix.norm()
    monkeypatch.setattr(row, "FUSED", 0)
    check(row, case, inputs(3, modes[1] * modes[3], HALF))


def test_packing_moves_memory_only():
    case = mpo(6, 5, 7, 9, 4)
    bound, tensors = row.bind(case.operator), case.operator.tensors()
    packed = bound.pack(tensors)
    again = bound.unpack(packed)
    for name, tensor in tensors.items():
        assert torch.equal(packed[name], tensor) and torch.equal(again[name], tensor) and again[name].is_contiguous()
    assert next(iter(packed.values()))[0].permute(2, 1, 0).is_contiguous()


def test_bond_zero_and_no_tokens():
    assert not answer(row, mpo(2, 3, 4, 5, 0), inputs(2, 15, HALF)).any()
    assert answer(row, mpo(2, 3, 4, 5, 2), inputs(0, 15, HALF)).shape == (0, 8)


def test_gradients():
    case = mpo(3, 4, 5, 2, 3, dtype=torch.float32)
    held = {name: tensor.requires_grad_() for name, tensor in case.operator.tensors().items()}
    x = inputs(4, 8, torch.float32).requires_grad_()
    weights = (x, *held.values())
    seed = inputs(4, 15, torch.float32, seed=3)
    got = torch.autograd.grad(row.bind(case.operator)(x, held), weights, seed)
    exact = torch.autograd.grad(x @ Mpo(tuple(held.values())).to_dense().T, weights, seed)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(
        row.mpo2, weights, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_what_it_does_not_run_is_said():
    assert row.refusal(low_rank(3, 4, 1).operator) == "it runs an MPO of two cores"
    assert row.refusal(Mpo(mpo(2, 3, 4, 5, 2).operator.cores, features=(7, 15))) == "the modes are padded"
    reason = row.refusal(mpo(2, 129, 2, 1, 1).operator)
    assert reason == "modes (2, 2, 129, 1) do not all lie between 1 and 128"
