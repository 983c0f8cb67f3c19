"""Transforms are exact changes of basis: they keep every norm, and the report is of the whole operator."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.decompose import (
    BitsPerWeight,
    DenseStage,
    InputPermutation,
    InputRotation,
    LowRankStage,
    OutputPermutation,
    OutputRotation,
    QuantizeStage,
    Recipe,
    decompose,
)  # fmt: skip
from tnc.decompose.peel import core, peel
from tnc.decompose.transforms import apply_transforms, transform_moments
from tnc.errors import ShapeError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.stats import LayerStats, Moments
from tnc.terms import Dense, Diagonal, Hadamard, LowRank, Permutation, Product, Quantized, Sum, dense64
from tnc.testing import make_problem, weighted_problems
from tnc.testing.oracle import error_in


@st.composite
def chains(draw, shape):
    """One to three transforms for a weight of that shape."""
    m, n = shape
    choices = {
        "in": InputRotation(draw(st.integers(0, 9))),
        "out": OutputRotation(draw(st.integers(0, 9))),
        "columns": InputPermutation(tuple(draw(st.permutations(range(n))))),
        "rows": OutputPermutation(tuple(draw(st.permutations(range(m))))),
    }
    return tuple(choices[k] for k in draw(st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=3)))


PROBLEMS = weighted_problems(metrics=("full", "fisher"), scales=(1.0, 1e-4, 1e4))


@settings(max_examples=60)
@given(problem=PROBLEMS, data=st.data())
def test_norms_and_nats_of_the_inner_problem_are_the_outer_ones(problem, data):
    shape = tuple(problem.weight.shape)
    inner = apply_transforms(problem.weight, data.draw(chains(shape)), problem.stats)
    error = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outer = dense64(inner.wrap(Dense(error)))
    for make in (Metric.full, Metric.auto, lambda stats: Metric(stats.heldout.second) if stats.heldout else Metric()):
        size = error_in(make(problem.stats), outer)
        # roots of singular moments are known to 1e-8 of the largest
        assert abs(error_in(make(inner.stats), error) - size) <= 1e-6 * size + 1e-7 * float(error.norm()) * max(
            1.0, float(problem.stats.hessian.norm()) ** 0.5
        ) * max(1.0, 1.0 if problem.stats.gradient is None else float(problem.stats.gradient.second.norm()) ** 0.5)


@settings(max_examples=60)
@given(problem=PROBLEMS, data=st.data())
def test_wrapping_the_inner_weight_gives_the_weight(problem, data):
    inner = apply_transforms(problem.weight, data.draw(chains(tuple(problem.weight.shape))), problem.stats)
    again = dense64(inner.wrap(Dense(inner.weight)))
    size = max(float(problem.weight.double().norm()), 1e-300)
    assert float((again - problem.weight.double()).norm()) <= 1e-12 * size


@pytest.mark.parametrize("size", [12, 13, 24])
@pytest.mark.parametrize("make", [lambda n: Hadamard.random(n, seed=5), lambda n: Permutation.of(torch.randperm(n))])
def test_moments_are_those_of_the_transformed_inputs(size, make):
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = make(size)
    moved = transform_moments(Moments(x.T @ x / 40, x.abs().mean(0), 40), operator)
    y = x @ operator.to_dense().double().T
    torch.testing.assert_close(moved.second, y.T @ y / 40, rtol=0, atol=1e-12)
    assert torch.equal(moved.second, moved.second.T) and moved.tokens == 40
    if isinstance(operator, Permutation):
        torch.testing.assert_close(moved.mean_abs, y.abs().mean(0))
    else:
        assert moved.mean_abs is None


def test_statistics_of_all_kinds_are_taken_along():
    problem = make_problem((8, 12), gradient="full", heldout=True)
    inner = apply_transforms(problem.weight, (InputRotation(), OutputRotation()), problem.stats)
    A, B = Hadamard.random(8, seed=1).to_dense(), Hadamard.random(12, seed=0).to_dense()
    torch.testing.assert_close(inner.weight, A @ problem.weight.double() @ B.T)
    torch.testing.assert_close(inner.stats.heldout.second, B @ problem.stats.heldout.second @ B.T)
    torch.testing.assert_close(inner.stats.gradient.second, A @ problem.stats.gradient.second @ A.T)
    assert inner.stats.tokens == problem.stats.tokens and inner.stats.inputs.mean_abs is None
    without = apply_transforms(problem.weight, (OutputRotation(),), LayerStats(problem.stats.inputs))
    assert without.stats.inputs is problem.stats.inputs and without.stats.gradient is None
    assert apply_transforms(problem.weight, (InputRotation(),), None).stats is None


def test_the_first_transform_is_outermost():
    weight = torch.randn(4, 4)
    inner = apply_transforms(weight, (InputRotation(), InputPermutation((1, 0, 3, 2)), OutputRotation()), None)
    kinds = [term.kind for term in inner.wrap(Dense(weight)).terms]
    assert kinds == ["hadamard", "dense", "permutation", "hadamard"]


def test_layers_of_one_width_share_the_rotation():
    q, k = (InputRotation().apply(torch.randn(m, 12), None).wrap(Dense(torch.zeros(m, 12))) for m in (5, 7))
    assert torch.equal(q.terms[-1].signs, k.terms[-1].signs)


@pytest.mark.parametrize(
    ("shape", "notes"),
    [
        ((4, 12), ()),
        ((13, 1), ("no output rotation: no Hadamard block above 1 divides 13 outputs",)),
        ((52, 26), ("input rotation in 13 blocks of 2: no order 26 is known",)),
    ],
)
def test_sizes_without_a_full_rotation_are_reported(shape, notes):
    weight = torch.randn(shape)
    found = decompose(weight, [DenseStage()], transforms=(InputRotation(), OutputRotation()))
    assert found.report.fallbacks == notes
    assert found.report.relative_error < 1e-6
    bits = sum(0 if b == 1 else 8 * -(-s // 8) for s, b in zip(shape, (core_block(s) for s in shape), strict=True))
    assert found.report.storage_bits == 32 * weight.numel() + bits


def core_block(size):
    return Hadamard.random(size).block


@settings(max_examples=25)
@given(
    problem=weighted_problems(metrics=("full",), dtypes=(torch.float32,), scales=(1.0,)), data=st.data(),
)  # fmt: skip
def test_report_is_of_the_whole_operator(problem, data):
    transforms = data.draw(chains(tuple(problem.weight.shape)))
    rank = min(problem.weight.shape) // 2
    stages = [QuantizeStage(IntFormat(3), method="rtn"), LowRankStage(rank)]
    found = decompose(problem.weight, stages, problem.stats, transforms=transforms)
    error = problem.weight.double() - dense64(found.operator)
    metric = Metric.full(problem.stats)
    assert found.report.relative_error == pytest.approx(metric.relative(error, problem.weight.double()), rel=1e-6)
    assert found.report.rank == rank and found.report.bits == 3
    assert found.report.storage_bits == found.operator.storage_bits
    assert found.report.lower_bound <= found.report.relative_error * (1 + 1e-9)


def test_low_rank_is_indifferent_to_rotation():
    """The optimum over ranks has one value in every basis, and the certificate meets it."""
    problem = make_problem((12, 24), spectrum="power", hessian="ill_conditioned", gradient="full", dtype=torch.float64)
    plain = decompose(problem.weight, [LowRankStage(3, metric=Metric.full)], problem.stats).report
    rotated = decompose(
        problem.weight, [LowRankStage(3, metric=Metric.full)], problem.stats,
        transforms=(InputRotation(), OutputRotation()),
    ).report  # fmt: skip
    for report in (plain, rotated):
        assert report.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
        assert report.lower_bound == pytest.approx(plain.relative_error, rel=1e-5)
        assert report.guaranteed_error == pytest.approx(plain.relative_error, rel=1e-6)


def test_rotation_spreads_outliers_and_helps_rounding():
    problem = make_problem((64, 128), spectrum="outlier_columns", hessian="full", dtype=torch.float32)
    stage = [QuantizeStage(IntFormat(4), method="rtn", clip_ratios=(1.0,))]
    plain = decompose(problem.weight, stage, problem.stats).report
    rotated = decompose(problem.weight, stage, problem.stats, transforms=(InputRotation(),)).report
    assert rotated.relative_error < 0.5 * plain.relative_error
    assert rotated.storage_bits == plain.storage_bits + 128


def test_bits_per_weight_counts_the_signs():
    weight = torch.randn(16, 16)
    found = decompose(
        weight, [LowRankStage(BitsPerWeight(4 + 31 / 256))], transforms=(InputRotation(), OutputRotation())
    )
    assert found.report.rank == 0  # one rank is 4 bits a weight, the signs are 32 bits
    more = decompose(
        weight, [LowRankStage(BitsPerWeight(4 + 32 / 256))], transforms=(InputRotation(), OutputRotation())
    )
    assert more.report.rank == 1


@pytest.mark.parametrize("transform", [InputPermutation((0, 1)), OutputPermutation((2, 1, 0))])
def test_a_permutation_of_another_size_is_refused(transform):
    with pytest.raises(ShapeError, match=r"a permutation of shape .* was given for a weight with"):
        transform.apply(torch.zeros(5, 4), None)


# peeling


def test_core_sees_through_wrappings():
    dense = Dense(torch.zeros(4, 4))
    ends = Hadamard.random(4), Permutation.of(torch.arange(4)), Diagonal(torch.ones(4))
    assert core(dense) is dense and core(Product((*ends, dense, *ends))) is dense
    factors = Product((dense, dense))
    assert [t.kind for t in core(Product((ends[0], factors, ends[1]))).terms] == ["dense", "dense"]
    assert core(Product(ends)) is ends[-1]


@settings(max_examples=40)
@given(problem=weighted_problems(metrics=("identity", "rms", "full", "fisher")), data=st.data())
def test_peeling_keeps_weight_and_norm(problem, data):
    m, n = problem.weight.shape
    scaling = Diagonal(torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5)
    inner = Dense(torch.randn(m, n, dtype=torch.float64))
    left = (Hadamard.random(m).inverse(), Permutation.of(torch.arange(m).flip(0)))
    operator = Product((*left, inner, scaling, Hadamard.random(n)))
    peeled = peel(problem.weight, operator, problem.metric)
    assert peeled.operator is inner
    outer = error_in(problem.metric, problem.weight.double() - dense64(operator))
    slack = 1e-6 * outer + 1e-6 * problem.scale + 1e-9
    gain = max(1.0, problem.scale / max(float(problem.weight.double().norm()), 1e-300))
    assert abs(error_in(peeled.metric, peeled.weight - inner.matrix) - outer) <= slack + 1e-6 * gain


def test_a_scaling_of_the_outputs_has_no_certificate():
    weight = torch.randn(4, 4)
    operator = Product((Diagonal(torch.ones(4)), Dense(weight)))
    assert peel(weight, operator, Metric()) is None
    zero = Product((Dense(weight), Diagonal(torch.tensor([1.0, 0, 1, 1]))))
    assert peel(weight, zero, Metric()) is None


# through a model


@dataclass(frozen=True)
class Doubling:
    """A transform of somebody's own."""

    def apply(self, weight, stats):
        inner = apply_transforms(weight, (), stats)
        vector = torch.full((weight.shape[1],), 2.0)
        return replace(
            inner, weight=weight.double() / 2, wrap=lambda term: Product((term, Diagonal(vector))), notes=("x",)
        )


def test_a_transform_of_ones_own():
    found = decompose(torch.ones(2, 2), [DenseStage()], transforms=(Doubling(),))
    assert found.operator.terms[0].matrix.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert found.report.relative_error == 0 and found.report.fallbacks == ("x",)


def test_a_recipe_carries_its_transforms():
    recipe = Recipe("mine", (QuantizeStage(IntFormat(4), method="rtn"),), transforms=(InputRotation(),))
    found = decompose(torch.randn(8, 16), recipe.stages, transforms=recipe.transforms)
    assert isinstance(core(found.operator), Quantized) and not isinstance(found.operator, Sum | LowRank)
