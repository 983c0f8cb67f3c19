"""dequant(Q) x + L (R x) in C on CPU: against float64 from the drawn numbers, on odd sizes."""

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_cases import low_rank, q_plus_lr, rounded

from tnc import compiled
from tnc.errors import BackendError
from tnc.formats import IntFormat, number_format
from tnc.kernels import choose
from tnc.kernels import qlr_cpu as row
from tnc.modules import FactoredLinear
from tnc.quant import rtn
from tnc.terms import Quantized, Sum

CPU = torch.device("cpu")
FEW = settings(max_examples=max(settings.default.max_examples // 4, 10))
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cases lie on the GPU there")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(row, "LEAST", 1)
    monkeypatch.setattr(row, "_BLOCK", 4 * 384 * 5)  # several blocks of rows, the last one cut off


def answer(operator, x):
    bound = row.bind(operator)
    return bound(x, bound.pack(operator.tensors()))


@given(data=st.data())
@FEW
def test_agrees_with_float64(data):
    bits = data.draw(st.sampled_from((2, 4, 8)))
    group = data.draw(st.sampled_from((128, 384, None)))
    rows = data.draw(st.integers(1, 17))
    dtype = data.draw(st.sampled_from(tuple(ROUNDING)))
    case = q_plus_lr(
        rows, 384, bits, group=group, symmetric=data.draw(st.booleans()), rank=data.draw(st.sampled_from((None, 0, 3))),
        scale=data.draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))), dtype=torch.float32,
        factors_first=data.draw(st.booleans()), seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    tokens = data.draw(st.integers(0, 7))
    x = torch.randn(tokens, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, exact = answer(case.operator, x), x.double() @ case.matrix.T
    assert y.dtype == dtype and y.shape == exact.shape
    scale = x.double().abs() @ case.matrix.abs().T
    assert ((y.double() - exact).abs() <= ROUNDING[dtype] * scale).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_is_written_by_any_number_of_threads(tokens, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = q_plus_lr(7, 256, 4, group=64, rank=None)
    x = torch.randn(tokens, 256)
    torch.testing.assert_close(answer(case.operator, x), (x.double() @ case.matrix.T).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packing_is_undone_bit_for_bit(bits, symmetric):
    operator = q_plus_lr(9, 256, bits, group=128, symmetric=symmetric, rank=2).operator
    bound, tensors = row.bind(operator), operator.tensors()
    packed = bound.pack(tensors)
    assert packed["words"].numel() * 32 == 9 * 256 * bits
    again = bound.unpack(packed)
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_gradients_reach_x_and_the_factors():
    case = q_plus_lr(7, 256, 4, group=64, rank=3, dtype=torch.float32)
    module = FactoredLinear(case.operator, backend="qlr_cpu")
    x = torch.randn(3, 256, requires_grad=True)
    seed = torch.randn(3, 7)
    module(x).backward(seed)
    torch.testing.assert_close(x.grad, (seed.double() @ case.matrix).float(), rtol=1e-4, atol=1e-4)
    plain = FactoredLinear(case.operator, backend="reference")
    plain(x.detach()).backward(seed)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(module.named_parameters())[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)
    bound = row.bind(case.operator)
    held = bound.pack(case.operator.tensors())
    weights = (held["words"], held["steps"], held["zeros"], 4)
    torch.library.opcheck(row.qlr_cpu, (x, *weights))


def test_a_module_takes_it_keeps_its_checkpoint_and_moves_on():
    operator = q_plus_lr(7, 256, 4, group=64, rank=3).operator
    module = FactoredLinear(operator)
    assert module.kernel == "qlr_cpu" and "codes decoded in registers, plus L (R x)" in module.explain()
    state = module.state_dict()
    assert all(torch.equal(state[name.replace(".", "_")], tensor) for name, tensor in operator.tensors().items())
    again = FactoredLinear(operator)
    again.load_state_dict(state)
    x = torch.randn(2, 3, 256)
    assert torch.equal(again(x), module(x))
    assert module.to("meta").kernel == "einsum"


def test_compile_and_export_hold():
    module = FactoredLinear(q_plus_lr(7, 256, 4, group=64, rank=3).operator)
    x = torch.randn(3, 256)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def test_what_it_does_not_run_is_said():
    weight = torch.randn(4, 256)
    for operator, reason in (
        (low_rank(3, 4, 1).operator, "it runs a quantized term, alone or plus one low-rank term"),
        (rtn(weight, IntFormat(3)), "it decodes integers of 2, 4 and 8 bits, not int3"),
        (rtn(weight, number_format("nf4")), "it decodes integers of 2, 4 and 8 bits, not"),
        (
            rtn(weight, IntFormat(4, group_size=32)),
            "groups of 32 in 256 columns are not a whole number of its units of 64",
        ),
        (rtn(weight, IntFormat(4, group_size=128, scale="uint8")), "scales are torch.uint8"),
        (rounded(7, 256, IntFormat(4), rank=4, factor_format=IntFormat(8)).operator, "it runs a quantized term, alone"),
    ):
        assert row.refusal(operator).startswith(reason)
        with pytest.raises(BackendError, match="cannot serve this operator"):
            choose(operator, CPU, torch.float32, backend="qlr_cpu")


def test_small_layers_stay_with_einsum(monkeypatch):
    monkeypatch.undo()
    operator = q_plus_lr(7, 256, 4, group=64, rank=3).operator
    assert row.refusal(operator) == "1792 weights are fewer than 1048576, from where it pays"
    assert isinstance(operator, Sum | Quantized)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_it_is_said_and_nothing_breaks(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("TNC_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    compiled.library.cache_clear()
    try:
        module = FactoredLinear(q_plus_lr(7, 256, 4, group=64, rank=3).operator)
        assert module.kernel == "einsum"
        expected = "there is none" if compiler == "no-such-compiler" else "could not build it"
        assert expected in module.explain()
    finally:
        compiled.library.cache_clear()


def test_a_broken_library_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("TNC_CACHE", str(tmp_path))
    compiled.library.cache_clear()
    try:
        assert not isinstance(compiled.library("kernels/qlr_cpu.c"), str)
        (built,) = tmp_path.glob("*.so")
        compiled.library.cache_clear()
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("built again"))
        assert not isinstance(compiled.library("kernels/qlr_cpu.c"), str)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / built.name).write_bytes(b"no library")
        monkeypatch.setenv("TNC_CACHE", str(tmp_path / "broken"))
        compiled.library.cache_clear()
        assert "could not build it" in compiled.library("kernels/qlr_cpu.c")
    finally:
        compiled.library.cache_clear()
