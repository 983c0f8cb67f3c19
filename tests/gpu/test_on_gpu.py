"""What the interpreter cannot show: races, graph replay, streams, offsets past 2**31. Needs a CUDA device."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from kernels.triton_cases import ROUNDING, Case, inputs, low_rank, q_plus_lr, rounded
from kernels.triton_cases import trellis as coded

from tnc.formats import IntFormat, number_format
from tnc.kernels import chain, mpo2, mpo3, qlr, trellis
from tnc.kernels import low_rank as low_rank_row
from tnc.kernels.hadamard import hadamard
from tnc.kernels.qlr_launch import Packed, rebuild, vector
from tnc.kernels.qlr_ops import dense
from tnc.modules import FactoredLinear
from tnc.quant import rtn
from tnc.terms import Chain, Hadamard, Mpo, dense64

BRAIN = torch.bfloat16
FRESH = 50


def two_cores():
    generator = torch.Generator().manual_seed(0)
    cores = [
        torch.randn(shape, generator=generator).to(BRAIN).cuda() / 8 for shape in [(1, 64, 32, 24), (24, 48, 64, 1)]
    ]
    matrix = torch.einsum("yaid,dbjz->abij", *(core.double() for core in cores)).reshape(64 * 48, 32 * 64)
    return Case(Mpo(tuple(cores)), matrix)


def three_cores():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 16, 12, 32), (32, 16, 16, 24), (24, 15, 16, 1)]
    cores = [torch.randn(shape, generator=generator).to(BRAIN).cuda() / 8 for shape in shapes]
    matrix = torch.einsum("xoia,apjb,bqkz->opqijk", *(core.double() for core in cores))
    return Case(Mpo(tuple(cores)), matrix.reshape(16 * 16 * 15, 12 * 16 * 16))


def quantized_cores():
    """A chain of two int8 cores, and its matrix."""
    generator = torch.Generator().manual_seed(0)
    terms = [rtn(torch.randn(32 * 64, 32, generator=generator).cuda() / 16, IntFormat(8, group_size=32)),
             rtn(torch.randn(32 * 48, 64, generator=generator).cuda() / 8, IntFormat(8, group_size=32))]  # fmt: skip
    operator = Chain(tuple(terms), (1, 32, 1), (64, 48), (32, 64))
    return Case(operator, dense64(operator))


def bind(row, operator):
    return row.bind(operator, torch.device("cuda", 0), BRAIN) if row is chain else row.bind(operator)


CASES = {
    **{f"int{bits}": (qlr, q_plus_lr(1000, 2048, bits, group=128, rank=64, dtype=BRAIN)) for bits in (2, 3, 4, 8)},
    "int4 g32 rank 200": (qlr, q_plus_lr(777, 1536, 4, group=32, rank=200, dtype=BRAIN)),
    "int4 few columns": (qlr, q_plus_lr(200, 320, 4, group=64, rank=64)),
    "int4 alone": (qlr, q_plus_lr(4096, 4096, 4, group=128, rank=None)),
    **{name: (qlr, rounded(1000, 2048, number_format(name), rank=64)) for name in ("mxfp4", "nvfp4")},
    **{name: (qlr, rounded(1000, 2048, number_format(name, group_size=64), rank=64)) for name in ("nf4", "nf3")},
    "int5": (qlr, rounded(1000, 2048, IntFormat(5, group_size=64), rank=64)),
    "int4 with int8 factors": (
        qlr,
        rounded(1000, 2048, IntFormat(4, group_size=64), rank=64, factor_format=IntFormat(8)),
    ),
    **{f"trellis {bits}": (trellis, coded(1000, 2048, bits, rank=64, dtype=BRAIN)) for bits in (2, 3, 4)},
    "trellis alone": (trellis, coded(600, 3000, 2, state_bits=16)),
    "low rank": (low_rank_row, low_rank(3000, 2048, 300, dtype=BRAIN)),
    "two cores": (mpo2, two_cores()),
    "three cores": (mpo3, three_cores()),
    "quantized cores": (chain, quantized_cores()),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 31, 64, 200])
def test_fresh_inputs_agree_with_float64_and_with_a_second_run(name, tokens):
    row, case = CASES[name]
    bound = bind(row, case.operator)
    tensors = case.operator.tensors()
    held = bound.pack(tensors) if hasattr(bound, "pack") else tensors
    columns = case.operator.shape[1]
    for seed in range(FRESH):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(tokens, columns, generator=generator, device="cuda").to(BRAIN)
        y = bound(x, held)
        assert torch.equal(y, bound(x, held))
        exact = x.double() @ case.matrix.T
        assert ((y.double() - exact).norm(dim=-1) <= ROUNDING[BRAIN] * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_a_captured_graph_follows_its_inputs(name, tokens):
    row, case = CASES[name]
    bound, tensors = bind(row, case.operator), case.operator.tensors()
    held = bound.pack(tensors) if hasattr(bound, "pack") else tensors
    x = inputs(tokens, case.operator.shape[1], BRAIN)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        bound(x, held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            y = bound(x, held)
    for seed in range(20):
        x.copy_(inputs(tokens, case.operator.shape[1], BRAIN, seed=seed))
        graph.replay()
        assert torch.equal(y, bound(x, held))


def test_streams_do_not_share_counters():
    case = q_plus_lr(4096, 4096, 4, group=128, rank=64, dtype=BRAIN)
    bound = qlr.bind(case.operator)
    held = bound.pack(case.operator.tensors())
    xs = [inputs(tokens, 4096, BRAIN, seed=tokens) for tokens in (1, 2, 8, 16)]
    expected = [bound(x, held) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found = [[] for _ in xs]
    for _ in range(30):
        for x, stream, into in zip(xs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                into.append(bound(x, held))
    torch.cuda.synchronize()
    for y, many in zip(expected, found, strict=True):
        assert all(torch.equal(y, each) for each in many)


def test_a_module_moves_to_the_gpu_and_back():
    operator = q_plus_lr(640, 512, 3, group=128, rank=16, dtype=BRAIN).operator
    module = FactoredLinear(operator).cpu()
    before = module.state_dict()
    module = module.to("cuda", BRAIN)
    assert "qlr: chosen" in module.explain() and "in one launch" in module.explain()
    assert all(torch.equal(module.state_dict()[name].cpu(), tensor) for name, tensor in before.items())
    x = inputs(3, 512, BRAIN)
    exact = x.double() @ module.operator.to_dense().double().T
    assert (module(x).double() - exact).norm() <= ROUNDING[BRAIN] * exact.norm()
    back = module.cpu()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("tokens", [1, 16])
def test_torch_compile_keeps_one_graph(tokens):
    module = FactoredLinear(q_plus_lr(640, 512, 4, group=128, rank=16, dtype=BRAIN).operator).to("cuda", BRAIN)
    x = inputs(tokens, 512, BRAIN)
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_offsets_past_two_to_the_31():
    rows, columns = 70_000, 32_768
    low = torch.randint(-(2**31), 2**31 - 1, (columns // 128, rows, 16), dtype=torch.int32, device="cuda")
    groups = torch.full((columns // 128, rows), 0x2000_0000 // 2**12, dtype=torch.int32, device="cuda") | (7 << 16)
    packed = Packed(
        low, low, groups, low.new_zeros(rows, 0, dtype=BRAIN), low.new_zeros(0, columns, dtype=BRAIN), 4, 128, "half"
    )
    some = torch.tensor([0, 1, 65_535, 65_536, rows - 1], device="cuda")
    part = Packed(*(t[:, some].contiguous() for t in (low, low, groups)), packed.left[:5], packed.right, 4, 128, "half")
    exact = dense(part, torch.float64)
    weight = rebuild(packed, BRAIN)
    assert weight.numel() > 2**31
    assert (weight[some].double() - exact).norm() <= ROUNDING[BRAIN] * exact.norm()
    x = inputs(1, columns, BRAIN)
    y = vector(x, packed)[:, some].double()
    assert (y - x.double() @ exact.T).norm() <= ROUNDING[BRAIN] * (x.double() @ exact.T).norm()


@pytest.mark.parametrize("size", [156, 4096, 11008, 13824, 14336, 53248])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [BRAIN, torch.float16, torch.float32])
def test_rotations_of_real_sizes(size, inverse, dtype):
    term = Hadamard.random(size)
    term = Hadamard(term.signs.cuda(), size, term.factors, inverse)
    for tokens in (1, 3, 64):
        x = inputs(tokens, size, dtype, seed=tokens)
        y = hadamard(x, term.signs, term.factors, inverse)
        assert torch.equal(y, hadamard(x, term.signs, term.factors, inverse))
        exact = term.linear(x.double())
        assert ((y.double() - exact).norm(dim=-1) <= ROUNDING[dtype] / 2 * exact.norm(dim=-1)).all()


def test_an_exported_module_runs_the_fused_kernels():
    module = FactoredLinear(q_plus_lr(640, 512, 4, group=128, rank=16, dtype=BRAIN).operator).to("cuda", BRAIN)
    x = inputs(3, 512, BRAIN)
    with torch.no_grad():
        assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_runs_its_own_layers():
    case = q_plus_lr(640, 512, 4, group=128, rank=16, dtype=BRAIN)
    here, there = (FactoredLinear(case.operator).to(f"cuda:{k}", BRAIN) for k in (0, 1))
    x = inputs(3, 512, BRAIN)
    assert torch.equal(there(x.to("cuda:1")).to("cuda:0"), here(x))
