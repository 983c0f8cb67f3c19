"""Rotations, scalings and permutations around a fused middle, and sums of such: against the product in float64."""

import copy
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_cases import q_plus_lr

from tnc.errors import BackendError
from tnc.kernels import Repacking, choose, composed, parts
from tnc.kernels import qlr_cpu as row
from tnc.modules import FactoredLinear
from tnc.networks import tt_svd
from tnc.terms import Dense, Diagonal, Hadamard, LowRank, Mpo, Permutation, Product, Selection, Sum

CPU = torch.device("cpu")
FEW = settings(max_examples=max(settings.default.max_examples // 4, 10))
# a transform before and one after the middle round x and y once more
ROUNDING = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8}
ROWS, COLUMNS = 24, 256
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cases lie on the GPU there")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(row, "LEAST", 1)


def draw_transform(kind, size, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "diagonal":
        return Diagonal(torch.rand(size, generator=generator) + 0.5)
    if kind == "permutation":
        return Permutation.of(torch.randperm(size, generator=generator))
    rotation = Hadamard.random(size, seed=seed)
    return rotation.inverse() if kind == "inverse" else rotation


TRANSFORMS = st.lists(st.sampled_from(("hadamard", "inverse", "diagonal", "permutation")), max_size=2)


def middle(rank=3, bits=4, seed=0, dtype=torch.float32):
    return q_plus_lr(ROWS, COLUMNS, bits, group=64 if bits > 2 else 128, rank=rank, dtype=dtype, seed=seed)


def wrapped(before, case, after):
    """The operator, and its matrix from that of the middle."""
    operator = Product((*after, case.operator, *before)) if before or after else case.operator
    matrix = case.matrix
    for term in before:
        matrix = matrix @ term.to_dense().double()
    for term in reversed(after):
        matrix = term.to_dense().double() @ matrix
    return operator, matrix


def agrees(module, matrix, x, extra=0.0):
    y, exact = module(x), x.double() @ matrix.T
    assert y.dtype == x.dtype and y.shape == exact.shape
    scale = x.double().norm(dim=-1, keepdim=True) * matrix.norm(dim=-1)
    assert ((y.double() - exact).abs() <= ROUNDING[x.dtype] * (scale + extra) + 1e-30).all()
    return y


def kernel_of(operator):
    return next(each.name for each in choose(operator, CPU, torch.float32)[1] if each.chosen)


@given(before=TRANSFORMS, after=TRANSFORMS, data=st.data())
@FEW
def test_transforms_on_both_sides_agree_with_float64(before, after, data):
    rank, bits = data.draw(st.sampled_from((None, 0, 3))), data.draw(st.sampled_from((2, 4, 8)))
    dtype, tokens = data.draw(st.sampled_from(tuple(ROUNDING))), data.draw(st.integers(0, 6))
    case = middle(rank, bits)
    before = [draw_transform(kind, COLUMNS, k) for k, kind in enumerate(before)]
    after = [draw_transform(kind, ROWS, 9 + k) for k, kind in enumerate(after)]
    operator, matrix = wrapped(before, case, after)
    module = FactoredLinear(operator)
    assert module.kernel == ("composed" if before or after else "qlr_cpu")
    x = torch.randn(2, tokens, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        agrees(module, matrix, x, matrix.norm())
        agrees(module, matrix, x.transpose(0, 1), matrix.norm())  # not contiguous
    held = module.state_dict()
    for name, tensor in operator.tensors().items():
        assert torch.equal(held[name.replace(".", "_")], tensor) and held[name.replace(".", "_")].dtype == tensor.dtype


def act_order(rank=None, seed=0):
    """A base whose columns were sorted when it was quantized, as GPTQ checkpoints have it."""
    base = middle(rank=None, seed=seed)
    order = Permutation.of(torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed)))
    return Product((base.operator, order)), base.matrix @ order.to_dense().double()


def factors(seed=5):
    generator = torch.Generator().manual_seed(seed)
    term = LowRank(torch.randn(ROWS, 3, generator=generator), torch.randn(3, COLUMNS, generator=generator) / 16)
    return term, term.left.double() @ term.right.double()


def selected():
    generator = torch.Generator().manual_seed(6)
    term = Product((Dense(torch.randn(ROWS, 5, generator=generator)), Selection.of(torch.arange(0, 50, 10), COLUMNS)))
    return term, term.terms[0].matrix.double() @ term.terms[1].to_dense().double()


SUMMANDS = {"act order": act_order, "low rank": factors, "selected": selected,
            "q": lambda: (middle(None, 8, 3).operator, middle(None, 8, 3).matrix)}  # fmt: skip


@pytest.mark.parametrize("names", [("act order", "low rank"), ("low rank", "selected", "q"), ("q", "selected"),
                                   ("act order", "q", "low rank", "selected"), ("q", "q", "low rank")])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_sums_add_the_parts_in_any_order(names, seed):
    drawn = [SUMMANDS[name]() for name in names]
    random.Random(seed).shuffle(drawn)
    operator, matrix = Sum(tuple(term for term, _ in drawn)), sum(each for _, each in drawn)
    module = FactoredLinear(operator)
    assert module.kernel == "composed"
    for tokens in (1, 7):
        agrees(module, matrix, torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(2)), matrix.norm())
    again = FactoredLinear(operator)
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, COLUMNS)
    assert torch.equal(again(x), module(x))


def test_a_pair_shares_its_kernel_and_what_is_left_goes_to_einsum():
    bound, _ = choose(Sum((middle(3).operator, selected()[0])), CPU, torch.float32)
    assert [part.row for part in bound.parts] == ["qlr_cpu", "einsum"]
    assert "plus L (R x)" in bound.describe() and " + einsum (" in bound.describe()


def rotated():
    return wrapped([Hadamard.random(COLUMNS)], middle(), [Hadamard.random(ROWS, seed=1).inverse()])


def test_it_says_what_runs_and_moves_on():
    operator, _ = rotated()
    module = FactoredLinear(operator)
    said = module.explain()
    assert "composed: chosen" in said and "qlr_cpu (up to 4 tokens" in said and said.count("fast hadamard") == 2
    assert isinstance(module._kernel, Repacking) and "1_0_codes" not in dict(module.named_buffers())
    held = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
    assert held * 8 < 1.5 * operator.storage_bits
    x = torch.randn(2, COLUMNS)
    y = module(x)
    assert torch.equal(copy.deepcopy(module).double().float()(x), y)
    assert module.to("meta").kernel == "einsum"


def test_gradients_reach_x_the_factors_and_the_scaling():
    case = middle(dtype=torch.float32)
    operator, matrix = wrapped([Diagonal(torch.rand(COLUMNS) + 0.5), Hadamard.random(COLUMNS)], case, [])
    module, plain = FactoredLinear(operator), FactoredLinear(operator, backend="reference")
    x, seed = torch.randn(3, COLUMNS, requires_grad=True), torch.randn(3, ROWS)
    module(x).backward(seed)
    torch.testing.assert_close(x.grad, (seed.double() @ matrix).float(), rtol=1e-4, atol=1e-4)
    plain(x.detach()).backward(seed)
    assert {name for name, _ in module.named_parameters()} == {"0_1_left", "0_1_right", "1_vector"}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(module.named_parameters())[name].grad, parameter.grad, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("make", [lambda: rotated()[0], lambda: Sum((act_order()[0], factors()[0]))])
def test_compile_and_export_hold(make):
    module = FactoredLinear(make())
    x = torch.randn(3, COLUMNS)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def two_cores():
    return tt_svd(torch.randn(ROWS, COLUMNS), (4, 6), (16, 16), max_rank=4)


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (lambda: middle(rank=None).operator, "it runs products and sums of several terms"),
        (lambda: middle().operator, "qlr_cpu runs all of it"),
        (lambda: Product((Hadamard.random(8),)), "it runs products and sums of several terms"),
        (lambda: Product((Hadamard.random(8), Diagonal(torch.ones(8)))), "none of its parts has a kernel of its own"),
        (lambda: Product((Dense(torch.ones(3, 8)), Hadamard.random(8))), "its factor 0 (dense) has no kernel of its"),
        (lambda: Sum((factors()[0], selected()[0])), "none of its parts has a kernel of its own"),
    ],
)  # fmt: skip
def test_what_it_does_not_run_is_said(operator, reason):
    refused = composed.parts_of(operator(), CPU, torch.float32)
    assert isinstance(refused, str) and refused.startswith(reason)
    with pytest.raises(BackendError, match="cannot serve this operator"):
        choose(operator(), CPU, torch.float32, backend="composed")


def test_a_row_that_runs_all_of_it_keeps_it():
    operator = Sum((two_cores(), factors()[0]))
    assert kernel_of(operator) == "mpo"
    assert composed.parts_of(operator, CPU, torch.float32) == "mpo runs all of it"
    rotated_mpo = Product((two_cores(), Hadamard.random(COLUMNS)))
    assert isinstance(rotated_mpo.terms[0], Mpo) and kernel_of(rotated_mpo) == "composed"
    x, matrix = torch.randn(2, COLUMNS), rotated_mpo.to_dense().double()
    agrees(FactoredLinear(rotated_mpo), matrix, x, matrix.norm())


MEASURED = {4096: {1: 1.6, 16: 1.8, 256: 5.4}, 11008: {1: 3.3, 16: 4.0, 256: 21.1}}  # docs/kernels.md, us on one H200


def test_the_predicted_time_is_the_sum_and_near_what_was_measured():
    gpu = torch.device("cuda")

    @dataclass(frozen=True)
    class Known:
        def __call__(self, x, tensors):
            return x

        def describe(self):
            return "known"

        def microseconds(self, tokens, device):
            return 7.0 if tokens < 100 else None

    for size, times in MEASURED.items():
        turn = parts.transform(Hadamard.random(size), "1.")
        for tokens, measured in times.items():
            assert 2 / 3 <= turn.microseconds(tokens, gpu) / measured <= 3 / 2
        assert turn.microseconds(1, CPU) is None
        scale = parts.transform(Diagonal(torch.ones(size)), "0.")
        known = parts.Part("known", Known(), (("", "2."),))
        chain = composed.Composed((turn, known, scale), False, gpu)
        alone = [part.microseconds(16, gpu) for part in chain.parts]
        assert chain.microseconds(16, gpu) == sum(alone)
        assert composed.Composed((turn, known), True, gpu).microseconds(16, gpu) > alone[0] + alone[1]
        assert chain.microseconds(1000, gpu) is None
        assert chain.describe().endswith(f"predicted {sum(alone) - alone[0] + turn.microseconds(1, gpu):.1f} us for 1, "
                                         f"{sum(alone):.1f} us for 16 tokens")  # fmt: skip
    assert "predicted" not in choose(rotated()[0], CPU, torch.float32)[0].describe()
