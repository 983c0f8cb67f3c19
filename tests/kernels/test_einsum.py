"""Every kernel computes the same map, and the einsum kernel plans it at the least cost."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from tnc.formats import IntFormat
from tnc.hadamard import hadamard_matrix
from tnc.kernels import choose, network
from tnc.kernels.einsum import Added, InTurn, _rebuild_flops, plan_for
from tnc.kernels.network import Form, Multiply, Network
from tnc.terms import Dense, Diagonal, Expression, Hadamard, LowRank, Permutation, Product, Quantized, Sum, base

BACKENDS = ["einsum", "reference"]  # the rows that serve every operator on every device
CPU = torch.device("cpu")


@dataclass
class Case:
    """An expression, and beside it its matrix and the same of absolute values, built by numpy in float64."""

    operator: Expression
    matrix: np.ndarray
    absolute: np.ndarray
    factors: int


def numbers(tensor):
    return tensor.to(torch.float64).numpy()


class Builder:
    """Random expressions; every matrix is built from the drawn numbers, never through ``to_dense``."""

    def __init__(self, seed, dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def integers(self, high, *shape):
        return torch.randint(0, high, shape, generator=self.generator)

    def dense(self, m, n):
        matrix = self.normal(m, n)
        return Case(Dense(matrix), numbers(matrix), abs(numbers(matrix)), 1)

    def diagonal(self, m):
        vector = self.normal(m)
        return Case(Diagonal(vector), np.diag(numbers(vector)), np.diag(abs(numbers(vector))), 1)

    def hadamard(self, m, transposed):
        term = Hadamard.random(m, seed=int(self.integers(99)))
        signs = 1 - 2.0 * np.unpackbits(term.signs.numpy(), count=m, bitorder="little")
        block = np.ones((1, 1))
        for factor in term.factors:
            block = np.kron(block, hadamard_matrix(factor).numpy())
        matrix = np.kron(np.eye(m // term.block), block) / term.block**0.5 * signs
        matrix = matrix.T if transposed else matrix
        return Case(term.inverse() if transposed else term, matrix, abs(matrix), 2)

    def permutation(self, m):
        order = torch.randperm(m, generator=self.generator)
        matrix = np.eye(m)[order.numpy()]
        return Case(Permutation.of(order), matrix, matrix, 1)

    def low_rank(self, m, n, rank):
        left, right = self.normal(m, rank), self.normal(rank, n)
        L, R = numbers(left), numbers(right)
        return Case(LowRank(left, right), L @ R, abs(L) @ abs(R), 2)

    def quantized(self, m, n, fmt):
        groups = n // (fmt.group_size or n)
        codes, zero = self.integers(fmt.levels, m, n), self.integers(fmt.levels, m, groups)
        scale = (torch.rand(m, groups, generator=self.generator) / fmt.levels).to(torch.float16)
        shift = np.full((m, groups), fmt.levels // 2) if fmt.symmetric else zero.numpy()
        matrix = np.repeat(numbers(scale), n // groups, 1) * (codes.numpy() - np.repeat(shift, n // groups, 1))
        return Case(Quantized.from_codes(codes, scale, zero, fmt), matrix, abs(matrix), 1)


@st.composite
def cases(draw, dtype=torch.float64, depth=2):
    builder = Builder(draw(st.integers(0, 2**31)), dtype)
    sizes = st.integers(1, 13)
    return draw_case(draw, builder, draw(sizes), draw(sizes), depth)


def draw_case(draw, builder, m, n, depth):
    kinds = (
        ["dense", "low_rank", "quantized"]
        + ["diagonal", "hadamard", "permutation"] * (m == n)
        + ["sum", "product"] * 2 * (depth > 0)
    )
    kind = draw(st.sampled_from(kinds))
    if kind == "sum":
        parts = [draw_case(draw, builder, m, n, depth - 1) for _ in range(draw(st.integers(1, 3)))]
        total = [sum(getattr(p, name) for p in parts) for name in ("matrix", "absolute", "factors")]
        return Case(Sum(tuple(p.operator for p in parts)), *total)
    if kind == "product":
        inner = [draw(st.sampled_from([m, n, 1, 7])) for _ in range(draw(st.integers(0, 2)))]
        shapes = zip([m, *inner], [*inner, n], strict=True)
        parts = [draw_case(draw, builder, a, b, depth - 1) for a, b in shapes]
        matrix, absolute = parts[0].matrix, parts[0].absolute
        for p in parts[1:]:
            matrix, absolute = matrix @ p.matrix, absolute @ p.absolute
        return Case(Product(tuple(p.operator for p in parts)), matrix, absolute, sum(p.factors for p in parts))
    if kind == "diagonal":
        return builder.diagonal(m)
    if kind == "hadamard":
        return builder.hadamard(m, draw(st.booleans()))
    if kind == "permutation":
        return builder.permutation(m)
    if kind == "low_rank":
        return builder.low_rank(m, n, draw(st.integers(0, min(m, n))))
    if kind == "quantized":
        group = draw(st.sampled_from([None, *(d for d in range(1, n + 1) if n % d == 0)]))
        fmt = IntFormat(draw(st.sampled_from([2, 3, 4, 8])), group_size=group, symmetric=draw(st.booleans()))
        return builder.quantized(m, n, fmt)
    return builder.dense(m, n)


# Token counts on both sides of the sizes above: plans that apply factors and plans that fold them both run.
batches = st.sampled_from([(), (0,), (1,), (2,), (5,), (3, 2), (2, 0, 3), (70,)])


def run(operator, x, backend):
    bound, _ = choose(operator, CPU, x.dtype, backend=backend)
    return bound(x, operator.tensors())


def check(case, x, y, eps):
    """``y`` within ``eps`` a rounding of exact, relative to the product of absolute values."""
    out_features = case.matrix.shape[0]
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], out_features)
    exact = numbers(x) @ case.matrix.T
    bound = abs(numbers(x)) @ case.absolute.T
    # each factor and each intermediate is rounded once, sums are accumulated in float32 or wider
    slack = (2 * case.factors + 2) * eps * bound + torch.finfo(x.dtype).tiny + 1e-6 * eps * bound.max(initial=0)
    assert (abs(numbers(y) - exact) <= slack).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(case=cases(), batch=batches, seed=st.integers(0, 99))
def test_float64_is_exact_to_roundoff(backend, case, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, case.matrix.shape[1], generator=generator, dtype=torch.float64)
    check(case, x, run(case.operator, x, backend), 16 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=30)
@given(case=cases(torch.float32), batch=batches, seed=st.integers(0, 99))
def test_float64_x_on_float32_factors_is_computed_in_float64(backend, case, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, case.matrix.shape[1], generator=generator, dtype=torch.float64)
    check(case, x, run(case.operator, x, backend), 16 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=10)
@given(data=st.data(), batch=batches, seed=st.integers(0, 99))
def test_narrow_dtypes_are_within_their_roundoff(backend, dtype, stored, data, batch, seed):
    case = data.draw(cases(stored))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, case.matrix.shape[1], generator=generator).to(dtype)
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
    check(case, x, run(case.operator, x, backend), eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend):
    case = Builder(3, torch.float16).low_rank(33, 17, 5)
    x = torch.randn(9, 17, generator=torch.Generator().manual_seed(1)).half()
    check(case, x, run(case.operator, x, backend), torch.finfo(torch.float16).eps)


def test_reference_rounds_the_weight_once():
    builder = Builder(0, torch.float32)
    operator = Sum((builder.dense(9, 31).operator, builder.low_rank(9, 31, 4).operator))
    x = builder.normal(6, 31).bfloat16()
    once = linear(x, operator.to_dense().to(torch.bfloat16))
    assert torch.equal(run(operator, x, "reference"), once)


def test_folding_rounds_the_weight_once():
    """At many tokens the low-rank term is added in float32 before the weight is rounded."""
    builder = Builder(0, torch.bfloat16)
    operator = Sum((builder.quantized(9, 32, IntFormat(4)).operator, builder.low_rank(9, 32, 4).operator))
    x = builder.normal(64, 32)
    assert torch.equal(run(operator, x, "einsum"), run(operator, x, "reference"))


def test_weights_that_meet_first_are_rounded_once():
    """A network whose cheapest order contracts the two factors before x gives what the reference gives."""
    operator = Builder(0, torch.bfloat16).low_rank(9, 8, 8).operator
    x = Builder(1, torch.bfloat16).normal(500, 8)
    assert choose(operator, CPU, x.dtype)[0].describe().endswith("more: (x (left right))")
    assert torch.equal(run(operator, x, "einsum"), run(operator, x, "reference"))


def test_chains_of_weights_are_rounded_once():
    """Three factors that meet before x: nearly every entry as from the product in float64, rounded once."""
    builder = Builder(0, torch.bfloat16)
    factors = [builder.normal(*shape) for shape in [(8, 40), (40, 40), (40, 8)]]
    operator = Product(tuple(Dense(factor) for factor in factors))
    x = torch.eye(8, dtype=torch.bfloat16).repeat(50, 1)
    assert "more: (x (" in choose(operator, CPU, x.dtype)[0].describe()
    exact = torch.linalg.multi_dot([factor.double() for factor in factors]).to(torch.bfloat16)
    differs = exact != run(operator, x, "einsum")[:8].T
    assert differs.double().mean() < 0.02


def test_a_leg_that_stays_is_not_summed_over():
    """x and q share a leg that a diagonal still needs."""
    given = network.Piece((), ("ab", "b"), ((2, 3), (3,)), "a", "b")
    kept = network._step(["tb", "ab"], "tab", given)
    assert isinstance(kept, network.Contract) and kept.equation == "tb,ab->tab"
    assert isinstance(network._step(["tb", "ab"], "ta", given), Multiply)


def test_flops_of_rebuilding():
    builder = Builder(0, torch.float32)
    dense, low_rank = builder.dense(5, 7).operator, builder.low_rank(5, 7, 3).operator
    assert _rebuild_flops(dense) == 0
    assert _rebuild_flops(low_rank) == 2 * 5 * 7 * 3
    assert _rebuild_flops(Sum((dense, low_rank, dense))) == 2 * 5 * 7 * 3 + 2 * 5 * 7
    tall = builder.dense(11, 5).operator
    assert _rebuild_flops(Product((tall, low_rank))) == 2 * 5 * 7 * 3 + 2 * 11 * 5 * 7


def test_an_empty_rank_is_planned_like_any_other():
    operator = Builder(0, torch.float32).low_rank(6, 40, 0).operator
    assert plan_for(operator, "", 1).describe() == "((x right) left)"


@settings(deadline=None, max_examples=100)
@given(m=st.integers(1, 600), n=st.integers(1, 600), rank=st.integers(1, 64), tokens=st.integers(1, 3000))
def test_low_rank_is_folded_into_the_base_exactly_when_that_takes_fewer_flops(m, n, rank, tokens):
    shapes = {"device": "meta", "dtype": torch.float16}
    codes = torch.empty(m, (n * 4 + 7) // 8, dtype=torch.uint8, device="meta")
    base_term = Quantized(codes, torch.empty(m, 1, **shapes), None, IntFormat(4, symmetric=True), n)
    rank = min(rank, m, n)
    term = LowRank(torch.empty(m, rank, **shapes), torch.empty(rank, n, **shapes))
    plan = plan_for(Sum((base_term, term)), "", tokens)
    assert isinstance(plan, Added)
    product = 2 * m * n * tokens
    folded, apart = 2 * m * n * rank + m * n + product, 2 * rank * (m + n) * tokens + product
    assert plan.flops <= min(folded, apart)
    assert plan.flops == (folded if plan.folded else apart)
    assert bool(plan.folded) == (folded < apart)


def test_classes_of_tokens_for_a_known_layer():
    """64 x 64, rank 4: folding costs 2*64*64*4 + 64*64 = 36864 FLOPs, factors 2*4*128 = 1024 a token: 36."""
    builder = Builder(0, torch.float32)
    operator = Sum((builder.quantized(64, 64, IntFormat(4)).operator, builder.low_rank(64, 64, 4).operator))
    bound, _ = choose(operator, CPU, torch.float32)
    assert bound.limits == (32,)
    assert bound.describe() == (
        "up to 32 tokens: (x [quantized]) + ((x 1.right) 1.left); more: x ([quantized] + [low_rank])"
    )


def test_plans_are_equal_for_equal_structure_and_hold_no_tensor():
    first, second = (
        choose(Builder(s, torch.float32).low_rank(20, 30, 3).operator, CPU, torch.float32)[0] for s in (1, 2)
    )
    assert first == second


def test_product_of_quantized_and_diagonal_scales_x_or_the_output_not_the_weight():
    builder = Builder(0, torch.float32)
    q, d = builder.quantized(40, 30, IntFormat(4)).operator, builder.diagonal(30).operator
    assert plan_for(Product((q, d)), "", 1).describe() == "((x 1.vector) [quantized])"


@pytest.mark.parametrize("tokens", [1, 400])
def test_a_sum_inside_a_product_is_applied_or_rebuilt_whichever_is_cheaper(tokens):
    builder = Builder(0, torch.float64)
    parts = [builder.dense(5, 40), builder.low_rank(40, 50, 2), builder.dense(40, 50), builder.dense(50, 60)]
    terms = [part.operator for part in parts]
    operator = Product((terms[0], Sum((terms[1], terms[2])), terms[3]))
    plan = plan_for(operator, "", tokens)
    assert isinstance(plan, InTurn if tokens == 1 else Network)
    x = builder.normal(tokens, 60)
    matrix = parts[0].matrix @ (parts[1].matrix + parts[2].matrix) @ parts[3].matrix
    np.testing.assert_allclose(numbers(plan(x, operator.tensors())), numbers(x) @ matrix.T, atol=1e-8)


def test_products_longer_than_the_alphabet():
    """Orthogonal factors, so that 80 of them neither vanish nor grow."""
    builder = Builder(0, torch.float64)
    factors = [torch.linalg.qr(builder.normal(3, 3)).Q for _ in range(80)]
    pairs = zip(factors[::2], factors[1::2], strict=True)
    operator = Product(tuple(LowRank(left, right) for left, right in pairs))
    x = builder.normal(4, 3)
    matrix = np.linalg.multi_dot([numbers(factor) for factor in factors])
    np.testing.assert_allclose(numbers(run(operator, x, "einsum")), numbers(x) @ matrix.T, atol=1e-12)
    assert isinstance(plan_for(operator, "", 1), InTurn)


@dataclass(frozen=True, eq=False)
class TwoCores(Expression):
    """A form of several legs a side, as someone would add it: cores (1, o1, i1, r) and (r, o2, i2, 1)."""

    first: torch.Tensor
    second: torch.Tensor
    kind: ClassVar[str] = "test_two_cores"

    @property
    def shape(self):
        (_, o1, i1, _), (_, o2, i2, _) = self.first.shape, self.second.shape
        return o1 * o2, i1 * i2

    def to_dense(self):
        return torch.einsum("yair,rbjz->abij", self.first, self.second).reshape(self.shape)

    def linear(self, x):
        return linear(x, self.to_dense())

    def tensors(self):
        return {"first": self.first, "second": self.second}

    def spec(self):
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_parts(cls, spec, tensors):
        return cls(tensors["first"], tensors["second"])


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setitem(base._KINDS, TwoCores.kind, TwoCores)

    def make(o1, o2, i1, i2, rank, seed=0):
        builder = Builder(seed, torch.float64)
        return TwoCores(builder.normal(1, o1, i1, rank), builder.normal(rank, o2, i2, 1))

    return make


def with_form(monkeypatch):
    form = Form((("first", "yair"), ("second", "rbjz")), out="ab", into="ij")
    monkeypatch.setitem(network._FORMS, TwoCores.kind, lambda leaf: form)


@pytest.mark.parametrize("entry", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_a_form_of_several_legs_needs_one_entry_and_works_without(two_cores, monkeypatch, entry, tokens):
    if entry:
        with_form(monkeypatch)
    a, b, c = two_cores(2, 3, 4, 5, 2), two_cores(4, 5, 3, 2, 3, seed=1), two_cores(5, 4, 2, 3, 2, seed=2)
    low_rank = Builder(3, torch.float64).low_rank(6, 20, 2).operator
    for operator in (
        a,
        Product((a, b)),
        Product((a, c)),
        Sum((a, low_rank)),
        Product((Sum((a, low_rank)), c)),
    ):
        x = Builder(9, torch.float64).normal(tokens, operator.shape[1])
        exact = linear(x, operator.to_dense())
        torch.testing.assert_close(run(operator, x, "einsum"), exact, rtol=0, atol=1e-11)


def test_legs_that_fit_join_and_legs_that_do_not_are_applied_in_turn(two_cores, monkeypatch):
    with_form(monkeypatch)
    a, b, c = two_cores(2, 3, 4, 5, 2), two_cores(4, 5, 3, 2, 3), two_cores(5, 4, 2, 3, 2)
    assert isinstance(plan_for(Product((a, b)), "", 1), Network)
    assert isinstance(plan_for(Product((a, c)), "", 1), InTurn)


def test_a_core_is_multiplied_through_linear(two_cores, monkeypatch):
    """No einsum where a matrix product does: two matrix products for two cores."""
    with_form(monkeypatch)
    plan = plan_for(two_cores(2, 3, 4, 5, 2), "", 1)
    assert [type(step) for positions, step in plan.steps if len(positions) == 2] == [Multiply, Multiply]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    builder = Builder(0, torch.float32)
    operator = Sum((builder.quantized(7, 8, IntFormat(3)).operator, builder.low_rank(7, 8, 2).operator))
    x = builder.normal(5, 8)
    before = {"x": x.clone(), **{k: t.clone() for k, t in operator.tensors().items()}}
    run(operator, x, backend)
    for name, tensor in {"x": x, **operator.tensors()}.items():
        assert torch.equal(tensor, before[name])


def test_rotations_are_applied_and_never_rebuilt(monkeypatch):
    def refuse(self):
        raise AssertionError("a rotation was rebuilt")

    monkeypatch.setattr(Hadamard, "to_dense", refuse)
    monkeypatch.setattr(Permutation, "to_dense", refuse)
    inner = Sum((Dense(torch.randn(12, 24)), LowRank(torch.randn(12, 2), torch.randn(2, 24))))
    operator = Product((Hadamard.random(12).inverse(), inner, Diagonal(torch.ones(24)), Hadamard.random(24)))
    for tokens in (1, 1000):
        run(operator, torch.randn(tokens, 24), "einsum")
    bound, _ = choose(operator, CPU, torch.float32, backend="einsum")
    assert bound.describe().count("fast hadamard") == 2 * len(bound.plans)


def test_a_rotation_inside_a_sum_costs_its_transform():
    rotation = Hadamard.random(4096)
    assert plan_for(rotation, "", 3).flops == 3 * (2 * 4096 * 48 + 4096)
    assert _rebuild_flops(rotation) == 4096 * (2 * 4096 * 48 + 4096)
    plan = plan_for(Sum((rotation, Dense(torch.zeros(4096, 4096)))), "", 64)
    assert not plan.folded
