"""Rotated, scaled and permuted layers on a CUDA device: what the interpreter cannot show."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from kernels.triton_cases import ROUNDING, inputs, low_rank, q_plus_lr

from tnc.modules import FactoredLinear
from tnc.terms import Diagonal, Hadamard, Permutation, Product, Sum, map_tensors

BRAIN = torch.bfloat16
ROWS, COLUMNS = 1376, 2048


def here(term):
    return map_tensors(term, lambda tensor: tensor.cuda())


BEFORE, AFTER = here(Hadamard.random(COLUMNS)), here(Hadamard.random(ROWS, seed=1).inverse())
ORDER = here(Permutation.of(torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))))
SCALING = Diagonal(torch.linspace(0.5, 2, COLUMNS, device="cuda", dtype=torch.float32))


def case(name):
    """The operator and its matrix in float64."""
    middle = q_plus_lr(ROWS, COLUMNS, 4, group=128, rank=64, dtype=BRAIN)
    factors = low_rank(ROWS, COLUMNS, 32, dtype=BRAIN, seed=5)
    base = middle.operator.terms[0]
    before, after, order = (term.to_dense().double() for term in (BEFORE, AFTER, ORDER))
    alone = q_plus_lr(ROWS, COLUMNS, 4, group=128, rank=None, dtype=BRAIN)
    return {
        "rotated": (Product((middle.operator, BEFORE)), middle.matrix @ before),
        "both sides": (Product((AFTER, middle.operator, BEFORE)), after @ middle.matrix @ before),
        "scaled": (Product((base, SCALING)), alone.matrix * SCALING.vector.double()),
        "act order": (Sum((Product((base, ORDER)), factors.operator)), alone.matrix @ order + factors.matrix),
        "rotated low rank": (Product((factors.operator, BEFORE)), factors.matrix @ before),
    }[name]


NAMES = ("rotated", "both sides", "scaled", "act order", "rotated low rank")


def module_of(operator):
    return FactoredLinear(operator).to("cuda", BRAIN)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 32, 64, 200])
def test_fresh_inputs_agree_with_float64_and_with_a_second_run(name, tokens):
    operator, matrix = case(name)
    module = module_of(operator)
    assert module.kernel == ("qlr" if name == "act order" else "composed"), module.explain()
    with torch.no_grad():
        for seed in range(20):
            x = inputs(tokens, COLUMNS, BRAIN, seed=seed)
            y, exact = module(x), x.double() @ matrix.T
            assert torch.equal(y, module(x)) and torch.equal(y, module(x.T.contiguous().T))
            error = (y.double() - exact).norm(dim=-1)
            assert (error <= 2 * ROUNDING[BRAIN] * exact.norm(dim=-1)).all()  # x or y rounded once more


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_captured_graph_follows_its_inputs_and_compile_keeps_one_graph(name, tokens):
    module = module_of(case(name)[0])
    x = inputs(tokens, COLUMNS, BRAIN)
    with torch.no_grad():
        with torch.cuda.stream(torch.cuda.Stream()):
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        for seed in range(10):
            x.copy_(inputs(tokens, COLUMNS, BRAIN, seed=seed))
            graph.replay()
            assert torch.equal(y, module(x))
        torch._dynamo.reset()  # every case compiles the same forward anew
        compiled, y = torch.compile(module, fullgraph=True)(x).double(), module(x).double()
        assert (compiled - y).norm() <= ROUNDING[BRAIN] * y.norm()  # a fused scaling rounds less often


def test_gradients_reach_x_and_the_factors():
    operator, matrix = case("both sides")
    module = module_of(operator)
    x = inputs(3, COLUMNS, BRAIN).requires_grad_()
    seed = inputs(3, ROWS, BRAIN, seed=2)
    module(x).backward(seed)
    exact = seed.double() @ matrix
    assert (x.grad.double() - exact).norm() <= 4 * ROUNDING[BRAIN] * exact.norm()
    assert module.get_parameter("1_1_left").grad.isfinite().all()
