"""One right factor for layers with the same inputs: optimal, counted once, rounded as one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_matrices import gaussian, generator, oracle_sigma, psd

from tnc.decompose import BitsPerWeight, Gate, LowRankStage, QuantizeStage, Rank, RelativeError, decompose
from tnc.decompose.shared import decompose_shared
from tnc.errors import RankError, RecipeError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.stats import LayerStats, Moments
from tnc.terms import dense64

ROWS = (6, 3, 9)


def layers(seed, *, fisher=True, rows=ROWS, columns=12, dtype=torch.float64):
    g = generator(seed)
    inputs = Moments(psd(columns, 4 * columns, 1.0, g), None, 50)
    weights = [gaussian(m, columns, g).to(dtype) for m in rows]
    gradients = [Moments(psd(m, 4 * m, 1.0, g), None, 50) if fisher else None for m in rows]
    return weights, [LayerStats(inputs, None, gradient) for gradient in gradients]


def squared_error(weights, stats, found):
    return sum(Metric.auto(s).squared_norm(w.double() - dense64(f.operator))
               for w, s, f in zip(weights, stats, found, strict=True))  # fmt: skip


def stored_bits(found):
    """Bits of all distinct tensors."""
    tensors = {id(t): t for each in found for t in each.operator.tensors().values()}
    return sum(t.numel() * t.element_size() * 8 for t in tensors.values())


@given(seed=st.integers(0, 99), rank=st.integers(0, 3), fisher=st.booleans())
def test_error_is_the_tail_of_the_stacked_problem(seed, rank, fisher):
    """Oracle: Eckart and Young for the rows stacked, in H and the block-diagonal of all G."""
    weights, stats = layers(seed, fisher=fisher)
    found = decompose_shared(weights, [LowRankStage(rank)], stats)
    gradient = torch.block_diag(*(s.gradient.second for s in stats)) if fisher else None
    tail = oracle_sigma(torch.cat(weights), stats[0].hessian, gradient)[rank:]
    assert squared_error(weights, stats, found) == pytest.approx(float(tail.square().sum()), rel=1e-6)
    rights = {each.operator.right.data_ptr() for each in found}
    assert len(rights) == 1 or rank == 0
    apart = [decompose(w, [LowRankStage(Rank(rank, forced=True))], s) for w, s in zip(weights, stats, strict=True)]
    assert squared_error(weights, stats, found) >= squared_error(weights, stats, apart) * (1 - 1e-9)


def test_a_rank_beyond_the_use_of_the_group_is_refused_unless_forced():
    weights, stats = layers(0, rows=(10, 10))
    m, n = sum(len(w) for w in weights), weights[0].shape[1]
    limit = m * n // (m + n)
    with pytest.raises(RankError, match=rf"above the useful limit mn/\(m\+n\) = {limit}"):
        decompose_shared(weights, [LowRankStage(limit + 1)], stats)
    forced = decompose_shared(weights, [LowRankStage(Rank(limit + 1, forced=True))], stats)
    assert forced[0].report.rank == limit + 1


def test_one_layer_is_the_usual_decomposition():
    weights, stats = layers(0, rows=(8,))
    (shared,), alone = (
        decompose_shared(weights, [LowRankStage(3)], stats),
        decompose(weights[0], [LowRankStage(3)], stats[0]),
    )
    torch.testing.assert_close(dense64(shared.operator), dense64(alone.operator))
    torch.testing.assert_close(shared.operator.left.norm(dim=0), shared.operator.right.norm(dim=1))


@settings(max_examples=25)
@given(seed=st.integers(0, 99), bits=st.sampled_from([4, 8]), sweeps=st.integers(1, 2), fisher=st.booleans())
def test_storage_adds_up_to_what_is_stored(seed, bits, sweeps, fisher):
    weights, stats = layers(seed, fisher=fisher)
    stages = [QuantizeStage(IntFormat(3)), LowRankStage(2, factor_format=IntFormat(bits))]
    found = decompose_shared(weights, stages, stats, sweeps=sweeps)
    assert sum(each.report.storage_bits for each in found) == stored_bits(found)
    apart = [decompose(w, stages, s) for w, s in zip(weights, stats, strict=True)]
    assert stored_bits(found) < sum(each.report.storage_bits for each in apart)
    for each, alone in zip(found, apart, strict=True):
        if sweeps == 1:
            assert torch.equal(each.operator.terms[0].codes, alone.operator.terms[0].codes)
        assert (each.report.rank, each.report.bits) == (2, 3)


def test_quantized_factors_are_close_to_floats():
    weights, stats = layers(3)
    errors = [squared_error(weights, stats, decompose_shared(weights, [LowRankStage(3, factor_format=f)], stats))
              for f in (None, IntFormat(8), IntFormat(4))]  # fmt: skip
    assert errors[0] <= errors[1] <= 1.01 * errors[0]
    assert errors[2] <= 1.2 * errors[0]


@given(seed=st.integers(0, 99))
def test_more_sweeps_are_never_worse(seed):
    weights, stats = layers(seed)
    stages = [LowRankStage(2), QuantizeStage(IntFormat(2))]
    errors = [squared_error(weights, stats, decompose_shared(weights, stages, stats, sweeps=n)) for n in (1, 2, 3)]
    assert errors[2] <= errors[1] * (1 + 1e-12) <= errors[0] * (1 + 2e-12)


@pytest.mark.parametrize("format", [None, IntFormat(4)])
@pytest.mark.parametrize("value", [5.0, 9.0])
def test_the_budget_is_that_of_all_layers_together(format, value):
    weights, stats = layers(0, dtype=torch.bfloat16)
    stages = [QuantizeStage(IntFormat(2, group_size=12)), LowRankStage(BitsPerWeight(value), factor_format=format)]
    found = decompose_shared(weights, stages, stats)
    elements = sum(w.numel() for w in weights)
    assert value - 4 < stored_bits(found) / elements <= value


def test_starts_and_budgets_of_a_rank_fitted_first():
    weights, stats = layers(0, dtype=torch.bfloat16)
    start = LowRankStage(3, first=LowRankStage(1))
    assert [each.report.rank for each in decompose_shared(weights, [start], stats)] == [1, 1, 1]
    stages = [LowRankStage(BitsPerWeight(9)), QuantizeStage(IntFormat(2, group_size=12))]
    found = decompose_shared(weights, stages, stats)
    assert 5 < stored_bits(found) / sum(w.numel() for w in weights) <= 9


def test_bad_input():
    weights, stats = layers(0)
    other = layers(1)[1]
    with pytest.raises(RecipeError, match=r"2 different inputs; expected .* layers that share their input moments"):
        decompose_shared(weights, [LowRankStage(1)], [stats[0], stats[1], other[2]])
    with pytest.raises(RecipeError, match=r"got 0 stages, sweeps=1"):
        decompose_shared(weights, [], stats)
    with pytest.raises(RecipeError, match=r"takes a rank or BitsPerWeight; got RelativeError"):
        decompose_shared(weights, [LowRankStage(RelativeError(0.1))], stats)
    with pytest.raises(RecipeError, match=r"takes one metric of calibrated layers; use it without Gate"):
        decompose_shared(weights, [LowRankStage(1, metric=Gate())], stats)
    with pytest.raises(RankError, match=r"LowRankStage\(rank=4\) is outside"):
        decompose_shared(weights, [LowRankStage(4)], stats)
