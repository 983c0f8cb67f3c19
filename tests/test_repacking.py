"""A module whose kernel has a layout of its own: one copy in memory, the portable tensors outside."""

import copy

import pytest
import torch
from safetensors.torch import load, save

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("moves between devices are tested in tests/gpu", allow_module_level=True)

from kernels.triton_cases import inputs, low_rank, q_plus_lr

from tnc.kernels import Kernel, Repacking, mpo2, qlr, register_kernel, table
from tnc.modules import FactoredLinear
from tnc.terms import Mpo

HALF = torch.float16


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """The fused rows serve every device, so that modules on the CPU repack too."""
    monkeypatch.setattr(table, "_KERNELS", dict(table._KERNELS))
    register_kernel(Kernel("qlr here", lambda operator, device, dtype: _reason(qlr, operator, device), qlr.bind, 99))
    register_kernel(Kernel("mpo2 here", lambda operator, device, dtype: _reason(mpo2, operator, device), mpo2.bind, 99))


def _reason(row, operator, device):
    return "no memory to repack" if device.type == "meta" else row.refusal(operator)


def two_cores():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 4, 5), (5, 6, 2, 1)]
    return Mpo(tuple(torch.randn(shape, generator=generator).to(HALF) for shape in shapes))


def operators():
    return [q_plus_lr(9, 256, bits, group=64, rank=2).operator for bits in (3, 4)] + [two_cores()]


@pytest.mark.parametrize("operator", operators(), ids=["int3", "int4", "mpo"])
class TestRepacked:
    def test_outside_nothing_changes(self, operator):
        module, plain = FactoredLinear(operator), FactoredLinear(operator, backend="reference")
        assert isinstance(module._kernel, Repacking) and not isinstance(plain._kernel, Repacking)
        ours, theirs = module.state_dict(), plain.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        assert all(tensor.is_contiguous() for tensor in ours.values())
        assert module.storage_bits == plain.storage_bits and module.operator.spec() == operator.spec()
        assert dict(module.named_parameters()).keys() == dict(plain.named_parameters()).keys()
        x = inputs(3, operator.shape[1], HALF)
        torch.testing.assert_close(module(x), plain(x), rtol=1e-2, atol=1e-2)

    def test_the_codes_are_held_once(self, operator):
        module = FactoredLinear(operator)
        held = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
        assert held <= module.storage_bits / 8 * 1.1 + 64

    def test_saved_and_loaded_bit_for_bit(self, operator):
        module = FactoredLinear(operator)
        stored = load(save(module.state_dict()))
        other = FactoredLinear(copy.deepcopy(operator))
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.zero_()
        other.load_state_dict(stored)
        x = inputs(2, operator.shape[1], HALF)
        assert torch.equal(other(x), module(x))
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in stored.items())

    def test_moves_casts_and_copies(self, operator):
        module = FactoredLinear(operator)
        x = inputs(2, operator.shape[1], HALF)
        y, before = module(x), module.state_dict()
        for other in (copy.deepcopy(module), copy.deepcopy(module).bfloat16(), copy.deepcopy(module).cpu()):
            assert torch.equal(other(x), y)
            assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())
        empty = copy.deepcopy(module).to("meta")
        assert not isinstance(empty._kernel, Repacking)
        empty.load_state_dict(before, assign=True)
        assert isinstance(empty._kernel, Repacking) and torch.equal(empty(x), y)


def test_training_reaches_the_parameters():
    for operator in operators():
        module = FactoredLinear(operator).float()
        names = [name for name, _ in module.named_parameters()]
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        x = inputs(2, operator.shape[1], HALF).float()
        first = module(x).square().mean()
        for _ in range(5):
            optimizer.zero_grad()
            loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
        assert module(x).square().mean() < first
        assert names == [name for name, _ in module.named_parameters()]
        reference = FactoredLinear(module.operator, backend="reference")
        torch.testing.assert_close(module(x), reference(x), rtol=2e-2, atol=2e-2)


def test_a_kernel_without_a_layout_is_left_alone():
    module = FactoredLinear(low_rank(4, 6, 2).operator)
    assert not isinstance(module._kernel, Repacking) and not module._repacked
