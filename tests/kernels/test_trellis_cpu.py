"""A trellis-coded weight times x in C on CPU: against float64 from the definition of the codes."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_cases import low_rank

from tnc import compiled
from tnc.errors import BackendError
from tnc.formats import CODES, IntFormat, TrellisFormat
from tnc.kernels import choose
from tnc.kernels import trellis_cpu as row
from tnc.modules import FactoredLinear
from tnc.quant import rtn
from tnc.terms import Hadamard, Product, Quantized, Sum, dense64

CPU = torch.device("cpu")
FEW = settings(max_examples=max(settings.default.max_examples // 3, 10))
ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
FORMATS = [TrellisFormat(bits, state_bits, code, path=path) for bits, state_bits in ((2, 12), (2, 16), (3, 12), (4, 8))
           for code in CODES for path in ("diagonal", "column")]  # fmt: skip
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="cases lie on the GPU there"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(row, "LEAST", 1)
    monkeypatch.setattr(row, "_BLOCK", 4 * 100 * 40)  # several blocks of rows, the last one cut off


def coded(rows, columns, format, *, seed=0, scale=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << format.bits, (rows, columns), generator=generator).to(torch.uint8)
    step = (torch.rand(rows, 1, generator=generator) + 0.1).to(scale)
    levels = CODES[format.code](format.states(codes)).double()
    return Quantized.from_codes(codes, step, None, format), step.double() * levels


def answer(operator, x):
    bound = row.bind(operator)
    return bound(x, bound.pack(operator.tensors()))


@given(data=st.data())
@FEW
def test_agrees_with_float64(data):
    format = data.draw(st.sampled_from(FORMATS))
    rows, columns = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 100))
    scale = data.draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    operator, matrix = coded(rows, columns, format, scale=scale, seed=data.draw(st.integers(0, 9)))
    dtype, tokens = data.draw(st.sampled_from(tuple(ROUNDING))), data.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 33)))
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, exact = answer(operator, x), x.double() @ matrix.T
    assert y.dtype == dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= ROUNDING[dtype] * (x.double().abs() @ matrix.abs().T)).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 32, 33])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("path", ["diagonal", "column"])
def test_every_row_is_written_by_any_number_of_threads(tokens, threads, path, monkeypatch):
    operator, matrix = coded(70, 45, TrellisFormat(2, path=path))
    x = torch.randn(tokens, 45, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.testing.assert_close(answer(operator, x), (x.double() @ matrix.T).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_packing_is_undone_bit_for_bit(format):
    operator, _ = coded(75, 34, format)
    bound, tensors = row.bind(operator), operator.tensors()
    again = bound.unpack(bound.pack(tensors))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], t) and again[name].dtype == t.dtype for name, t in tensors.items())


def test_double_quantized_scales_come_back():
    operator = rtn(torch.randn(40, 33), TrellisFormat(2, 8, path="diagonal", scale="uint8"))
    bound, tensors = row.bind(operator), operator.tensors()
    packed = bound.pack(tensors)
    again = bound.unpack(packed)
    assert all(torch.equal(again[name], t) for name, t in tensors.items()) and again.keys() == tensors.keys()
    x = torch.randn(2, 33)
    torch.testing.assert_close(bound(x, packed), x @ operator.to_dense().T, rtol=1e-4, atol=1e-4)


def test_gradients_reach_x():
    operator, matrix = coded(40, 33, TrellisFormat(3, path="diagonal"))
    x, seed = torch.randn(3, 33, requires_grad=True), torch.randn(3, 40)
    FactoredLinear(operator, backend="trellis_cpu")(x).backward(seed)
    torch.testing.assert_close(x.grad, (seed.double() @ matrix).float(), rtol=1e-4, atol=1e-4)
    held = row.bind(operator).pack(operator.tensors())
    names = ("stream", "marks", "seams", "steps")
    torch.library.opcheck(row.trellis_cpu, (x, *(held[name] for name in names), 3, 12, "1mad", "diagonal"))


def test_a_rotated_layer_with_factors_takes_it_keeps_its_checkpoint_and_moves_on():
    base, _ = coded(40, 32, TrellisFormat(2, path="diagonal"))
    factors = low_rank(40, 32, 3, dtype=torch.float32).operator
    operator = Product((Hadamard.random(40, seed=1), Sum((base, factors)), Hadamard.random(32)))
    module = FactoredLinear(operator)
    assert "trellis_cpu" in module.explain() and "states decoded in registers" in module.explain()
    state = module.state_dict()
    assert all(torch.equal(state[name.replace(".", "_")], tensor) for name, tensor in operator.tensors().items())
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(module(x), (x.double() @ dense64(operator).T).float(), rtol=1e-4, atol=1e-4)
    assert "trellis_cpu" not in module.to("meta").explain().splitlines()[0]


def test_compile_and_export_hold():
    module = FactoredLinear(coded(40, 32, TrellisFormat(2))[0])
    assert module.kernel == "trellis_cpu"
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def test_what_it_does_not_run_is_said():
    weight = torch.randn(20, 32)
    for operator, reason in (
        (low_rank(3, 4, 1).operator, "it runs a trellis-coded term alone"),
        (rtn(weight, IntFormat(4)), "it runs a trellis-coded term alone"),
        (rtn(weight, TrellisFormat(2, 4, group_size=8)), "a row has 4 scales; it takes one"),
        (rtn(weight, TrellisFormat(2, 4, length=16)), "sequences of at most 16 rows may begin twice in 16 rows"),
    ):
        assert row.refusal(operator) == reason
        with pytest.raises(BackendError, match="cannot serve this operator"):
            choose(operator, CPU, torch.float32, backend="trellis_cpu")


def test_small_layers_and_machines_without_a_compiler_stay_with_einsum(monkeypatch, tmp_path):
    operator, _ = coded(40, 32, TrellisFormat(2))
    monkeypatch.setattr(row, "LEAST", 10**6)
    assert "1280 weights are fewer than 1000000" in FactoredLinear(operator).explain()
    monkeypatch.setattr(row, "LEAST", 1)
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled.library.cache_clear()
    try:
        module = FactoredLinear(operator)
        assert module.kernel == "einsum" and "there is none ($CC, cc)" in module.explain()
    finally:
        compiled.library.cache_clear()
