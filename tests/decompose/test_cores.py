"""Quantized cores: bits counted to the byte, feedback and refits that help, and ways back to the float operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.decompose import BitsPerWeight, MpoStage, Rank, RelativeError, decompose, recipe
from tnc.decompose.cores import core_bits, formats_of, quantize_cores, row_cut
from tnc.errors import BudgetError, FormatError, RecipeError, ShapeError
from tnc.formats import IntFormat
from tnc.kernels.einsum import plan
from tnc.metric import Metric
from tnc.modules import FactoredLinear
from tnc.networks import site_modes, tt_svd
from tnc.networks.als import layer_of, local_problem
from tnc.networks.canonical import mixed_canonical
from tnc.networks.core_moments import core_moments
from tnc.terms import Chain, Dense, LowRank, Product, Quantized, Sum, dense64
from tnc.terms.rows import gather_rows
from tnc.testing import make_problem, mpos, weighted_problems

PROBLEM = make_problem((24, 24), hessian="full", gradient="full", metric="fisher", heldout=True, seed=4)
FEW = settings(max_examples=max(settings.default.max_examples // 10, 8))
INT8, INT4 = IntFormat(8, 16, pad=True), IntFormat(4, 16, pad=True)


def error(operator, problem=PROBLEM):
    return problem.metric.relative(problem.weight.double() - dense64(operator), problem.weight.double())


def truncated(weight, rank, cores):
    """TT-SVD over balanced modes."""
    return tt_svd(weight, *site_modes(tuple(weight.shape), cores), max_rank=rank)


def as_chain(mpo, cuts):
    """The operator with its cores as dense terms, cut into rows after so many legs."""
    terms = []
    for core, cut in zip(mpo.cores, cuts, strict=True):
        rows = torch.Size(core.shape[:cut]).numel()
        terms.append(Dense(core.reshape(rows, core.numel() // rows)))
    return Chain(tuple(terms), mpo.ranks, mpo.out_modes, mpo.in_modes, mpo.features)


@given(mpo=mpos(), cuts=st.lists(st.integers(0, 3), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_chain_of_dense_cores_is_their_operator(mpo, cuts, seed):
    chain = as_chain(mpo, cuts[: len(mpo.cores)])
    assert (chain.shape, chain.ranks, chain.storage_bits) == (mpo.shape, mpo.ranks, mpo.storage_bits)
    assert torch.equal(chain.to_dense(), mpo.to_dense())
    x = torch.randn(3, mpo.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(chain.linear(x), mpo.linear(x))
    index = torch.randint(mpo.shape[0], (4,), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(gather_rows(chain, index), mpo.to_dense()[index])


def test_a_product_is_a_chain_with_modes_of_one():
    left, right = torch.randn(6, 3), torch.randn(3, 5)
    chain = Chain((Dense(left), Dense(right)), (1, 3, 1), (6, 1), (1, 5))
    torch.testing.assert_close(chain.to_dense(), LowRank(left, right).to_dense())
    torch.testing.assert_close(chain.to_dense(), Product((Dense(left), Dense(right))).to_dense())


@given(
    problem=weighted_problems(dtypes=(torch.float64,), scales=(1.0,)), cores=st.integers(1, 3), data=st.data(),
    rank=st.integers(1, 4),
)  # fmt: skip
@FEW
def test_moments_are_traces_of_the_normal_matrix(problem, cores, data, rank):
    """Against the quadratic form itself, one pair of unit cores at a time."""
    mpo = truncated(problem.weight, rank, cores)
    layer = layer_of(problem.weight, mpo, None, problem.metric)
    k, cut = data.draw(st.integers(0, cores - 1)), data.draw(st.integers(0, 3))
    local = local_problem(layer, list(mixed_canonical(mpo, k).cores), k, 1)
    columns, rows = core_moments(local, cut)
    if columns.numel() * len(rows) > 4000:
        return
    size = local.sizes[0] * local.sizes[1] * local.sizes[2]
    units = torch.eye(size, dtype=torch.float64)
    normal = torch.stack([local.normal(unit.reshape(local.sizes)).flatten() for unit in units])
    legs = normal.reshape(len(rows), len(columns), len(rows), len(columns))
    scale = float(normal.abs().max()) + 1e-300
    torch.testing.assert_close(columns / scale, torch.einsum("pqpr->qr", legs) / scale)
    torch.testing.assert_close(rows / scale, torch.einsum("pqrq->pr", legs) / scale)


@pytest.mark.parametrize("format", [INT8, INT4, (INT8, None), IntFormat(8)])
@pytest.mark.parametrize("cores", [2, 3])
def test_bits_are_counted_before_and_after(format, cores):
    formats = format if isinstance(format, IntFormat) else (*format, *[INT4] * (cores - 2))
    stage = MpoStage(6, cores=cores, core_format=formats, sweeps=1)
    found = decompose(PROBLEM.weight, (stage,), PROBLEM.stats)
    assert isinstance(found.operator, Chain)
    stored = found.operator.storage_bits
    assert stored == sum(t.numel() * t.element_size() * 8 for t in found.operator.tensors().values())
    assert stored == stage.stored_bits((24, 24), torch.float32, 6) == found.report.storage_bits
    kinds = [term.kind for term in found.operator.terms]
    assert kinds == ["quantized" if each else "dense" for each in formats_of(formats, cores)]
    assert found.report.bonds == found.operator.ranks[1:-1]
    assert found.report.svd_relative_error > 0
    assert 0 < found.report.lower_bound <= found.report.relative_error


def test_eight_bits_cost_little_and_a_budget_buys_larger_bonds():
    half = decompose(PROBLEM.weight, (MpoStage(BitsPerWeight(8), dtype=torch.float16),), PROBLEM.stats)
    eight = decompose(PROBLEM.weight, (MpoStage(BitsPerWeight(8), core_format=INT8),), PROBLEM.stats)
    assert eight.report.bits_per_weight <= 8
    assert eight.report.bonds[0] > half.report.bonds[0]
    assert error(eight.operator) < 0.95 * error(half.operator)
    same = decompose(PROBLEM.weight, (MpoStage(half.report.bonds[0], core_format=INT8),), PROBLEM.stats)
    assert error(same.operator) < 1.05 * error(half.operator)


@pytest.mark.parametrize("cores", [2, 3])
def test_feedback_and_refits_both_help(cores):
    mpo = decompose(PROBLEM.weight, (MpoStage(5, cores=cores),), PROBLEM.stats).operator
    alone, fed, refitted = (
        error(quantize_cores(PROBLEM.weight, mpo, PROBLEM.metric, IntFormat(3), method=m, rounds=r).chain)
        for m, r in (("rtn", 0), ("yaqa", 0), ("yaqa", 2))
    )
    assert refitted < 0.95 * fed
    assert fed < 0.99 * alone


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize(("method", "bits"), [("yaqa", 3), ("rtn", 2)])
def test_solving_for_each_core_again_helps_and_the_best_is_kept(cores, method, bits):
    mpo = decompose(PROBLEM.weight, (MpoStage(5, cores=cores),), PROBLEM.stats).operator
    errors = [
        error(quantize_cores(PROBLEM.weight, mpo, PROBLEM.metric, IntFormat(bits), method=method, rounds=rounds).chain)
        for rounds in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.98 * errors[0]


@given(
    problem=weighted_problems(dtypes=(torch.float32, torch.bfloat16)), rank=st.integers(1, 4), cores=st.integers(1, 3),
    seed=st.integers(0, 9),
)  # fmt: skip
@FEW
def test_more_rounds_are_never_worse(problem, rank, cores, seed):
    mpo = truncated(problem.weight, rank, cores)
    errors = []
    for rounds in (1, 2):
        found = quantize_cores(problem.weight, mpo, problem.metric, INT4, rounds=rounds, seed=seed).chain
        errors.append(problem.metric.norm(problem.weight.double() - dense64(found)))
        assert all(isinstance(term, Quantized) for term in found.terms)
    assert errors[1] <= errors[0] * (1 + 1e-9)


def test_without_a_metric_and_rounds_a_core_is_rounded_to_the_nearest_code():
    built = recipe("compactifai", rank=5, factor_bits=8)
    found = decompose(PROBLEM.weight, built.stages, PROBLEM.stats).operator
    plain = decompose(PROBLEM.weight, recipe("compactifai", rank=5).stages, PROBLEM.stats).operator
    assert isinstance(found, Chain)
    assert float((dense64(found) - dense64(plain)).norm()) < 0.01 * float(dense64(plain).norm())
    built = recipe("mpo_quantized", rank=5)
    assert built.stages[0].core_format == IntFormat(8, 64, pad=True)
    assert recipe("mpo_quantized", rank=5, factor_format="nf4").stages[0].core_format.table == "nf4"
    assert recipe("mpo_quantized", rank=5, factor_format="trellis2").stages[0].core_format.code_bits == 2


def test_the_zero_matrix_and_bond_zero():
    found = decompose(torch.zeros(24, 24), (MpoStage(3, core_format=INT8),), PROBLEM.stats)
    assert not found.operator.to_dense().any()
    found = decompose(PROBLEM.weight, (MpoStage(Rank(0), core_format=INT8),), PROBLEM.stats)
    assert found.report.storage_bits == 0


def test_padding_of_prime_sizes():
    problem = make_problem((23, 13), hessian="full", gradient="full", metric="fisher", seed=1)
    found = decompose(problem.weight, (MpoStage(4, core_format=INT8),), problem.stats)
    assert found.operator.shape == (23, 13)
    plain = decompose(problem.weight, (MpoStage(4),), problem.stats)
    assert error(found.operator, problem) < 1.05 * error(plain.operator, problem)


def test_the_einsum_kernel_contracts_the_cores():
    """No dense weight: the cores are contracted with x, alone and in sums."""
    found = decompose(PROBLEM.weight, (MpoStage(3, core_format=INT8),), PROBLEM.stats).operator
    assert "chain" not in plan(found, 1).describe()
    for operator in (found, Sum((found, Dense(torch.eye(24))))):
        module = FactoredLinear(operator, backend="einsum")
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(module(x), x @ operator.to_dense().T)


def test_rows_of_a_core_are_neither_long_nor_short():
    assert row_cut((1, 8, 8, 16)) == 0
    assert row_cut((1, 32, 32, 16)) == 2
    assert row_cut((64, 16, 16, 1)) == 1
    assert row_cut((64, 16, 64, 64)) == row_cut((1, 64, 64, 64)) == 2
    assert row_cut((64, 64, 64, 1)) == 1
    assert row_cut((2, 128, 128, 64)) == 2
    assert row_cut((64, 128, 256, 64)) == 3
    assert core_bits(IntFormat(8), (4, 6), (6, 4), (1, 5, 1), torch.float32) == 2 * (120 * 8 + 16 + 8)
    assert core_bits(None, (4, 6), (6, 4), (1, 5, 1), torch.bfloat16) == 240 * 16


def test_input_is_checked():
    with pytest.raises(RecipeError, match="cores are rounded after"):
        MpoStage(RelativeError(0.1), core_format=INT8)
    with pytest.raises(RecipeError, match="unknown"):
        MpoStage(3, core_method="magic")
    with pytest.raises(FormatError, match="one for every core"):
        decompose(PROBLEM.weight, (MpoStage(3, core_format=(INT8,)),), PROBLEM.stats)
    with pytest.raises(FormatError, match="does not divide"):
        decompose(PROBLEM.weight, (MpoStage(3, core_format=IntFormat(8, 64)),), PROBLEM.stats)
    with pytest.raises(BudgetError, match="at least"):
        decompose(PROBLEM.weight, (MpoStage(BitsPerWeight(0.01), core_format=INT8),), PROBLEM.stats)
    with pytest.raises(ShapeError, match="cut between two legs"):
        Chain((Dense(torch.ones(6, 4)), Dense(torch.ones(3, 2))), (1, 2, 1), (6, 1), (1, 4))
    with pytest.raises(ShapeError, match="bond dimension 1"):
        Chain((Dense(torch.ones(6, 2)),), (1, 2), (6,), (1,))
    with pytest.raises(ShapeError, match="features"):
        Chain((Dense(torch.ones(2, 2)),), (1, 1), (2,), (2,), (3, 2))


def test_refits_and_moments_hold_in_the_frobenius_norm():
    found = decompose(PROBLEM.weight, (MpoStage(4, core_format=INT4),))
    plain = decompose(PROBLEM.weight, (MpoStage(4),))
    assert found.report.relative_error < 1.1 * plain.report.relative_error
    assert Metric().relative(PROBLEM.weight - found.operator.to_dense(), PROBLEM.weight) > 0
