import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies_matrices import SCALES, SIZES, gaussian, generator

from tnc.errors import NonFiniteError, ShapeError, StatsError
from tnc.stats import LayerStats, Moments, MomentsAccumulator


def moments_of(x):
    accumulator = MomentsAccumulator(x.shape[1])
    accumulator.add(x)
    return accumulator.moments()


def assert_same(a: Moments, b: Moments):
    assert a.tokens == b.tokens
    scale = float(b.second.abs().max()) or 1.0
    torch.testing.assert_close(a.second, b.second, rtol=0, atol=1e-13 * scale)
    torch.testing.assert_close(a.mean_abs, b.mean_abs, rtol=1e-12, atol=0)


@given(
    features=SIZES, counts=st.lists(st.integers(0, 9), min_size=3, max_size=3), scale=SCALES, seed=st.integers(0, 99)
)
def test_merge_is_commutative_associative_and_equals_all_tokens_at_once(features, counts, scale, seed):
    g = generator(seed)
    parts = [scale * gaussian(count, features, g) for count in counts]
    a, b, c = map(moments_of, parts)
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b).merge(c), moments_of(torch.cat(parts)))


@given(features=SIZES, batches=st.lists(st.integers(0, 7), max_size=5), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))  # fmt: skip
def test_accumulator_is_the_brute_force_mean(features, batches, seed, dtype):
    g = generator(seed)
    parts = [gaussian(count, features, g).to(dtype) for count in batches]
    accumulator = MomentsAccumulator(features)
    for part in parts:
        accumulator.add(part)
    found = accumulator.moments()
    x = torch.cat([torch.zeros(0, features, dtype=torch.float64), *(p.double() for p in parts)])
    count = max(len(x), 1)
    # float32 products for all but float64 inputs: a few eps of the largest entry
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    expected = sum((torch.outer(row, row) for row in x), start=torch.zeros(features, features).double()) / count
    torch.testing.assert_close(found.second, expected, rtol=0, atol=tolerance * max(1.0, float(expected.max())))
    torch.testing.assert_close(found.mean_abs, x.abs().sum(0) / count, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.diagonal, found.second.diagonal())
    assert (found.tokens, found.features) == (len(x), features)
    assert found.second.dtype == found.mean_abs.dtype == torch.float64


def test_moments_by_hand():
    found = moments_of(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    assert found.second.tolist() == [[5.0, -1.0], [-1.0, 2.0]]
    assert found.mean_abs.tolist() == [2.0, 1.0]


def test_float16_activations_do_not_overflow():
    x = torch.full((3, 2), 60000.0, dtype=torch.float16)  # 60000² is above 65504
    found = moments_of(x)
    torch.testing.assert_close(found.second, (x.double().T @ x.double()) / 3, rtol=1e-6, atol=0)


def test_later_batches_do_not_change_moments_already_taken():
    accumulator = MomentsAccumulator(2)
    accumulator.add(torch.ones(1, 2))
    first = accumulator.moments()
    accumulator.add(10 * torch.ones(5, 2))
    assert first.second.tolist() == [[1, 1], [1, 1]]
    assert first.tokens == 1


def test_accumulator_detaches():
    x = torch.ones(2, 2, requires_grad=True)
    assert not moments_of(x).second.requires_grad


@given(features=SIZES, tokens=st.integers(0, 15), scale=SCALES, seed=st.integers(0, 99))
def test_rank_is_the_rank_of_the_tokens(features, tokens, scale, seed):
    x = scale * gaussian(tokens, features, generator(seed))
    found = moments_of(x)
    before = found.second.clone()
    expected = int(torch.linalg.matrix_rank(x, rtol=1e-7)) if tokens else 0
    smallest = torch.linalg.svdvals(x)[:expected].min() ** 2 / torch.linalg.svdvals(x)[0] ** 2 if expected else 1.0
    if smallest > 1e-5:  # well above the float32 noise that `rank` counts as zero
        assert found.rank == expected == int(torch.linalg.matrix_rank(found.second, hermitian=True, rtol=1e-9))
    torch.testing.assert_close(found.second, before, rtol=0, atol=0)


def test_rank_of_no_and_of_wide_spectra():
    assert moments_of(torch.zeros(3, 4)).rank == 0
    assert Moments(torch.zeros(0, 0).double(), None, 1).rank == 0
    assert Moments(torch.diag(torch.tensor([1.0, 1e-6, 1e-8])).double(), None, 1).rank == 2  # eps(float32) is 1.2e-7


def test_merge_without_mean_abs_keeps_none():
    x = moments_of(torch.ones(2, 2))
    merged = x.merge(Moments(torch.eye(2).double(), None, 2))
    assert merged.mean_abs is None
    assert merged.second.tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_merge_of_nothing_is_nothing():
    empty = MomentsAccumulator(3).moments()
    merged = empty.merge(empty)
    assert merged.tokens == 0
    assert not merged.second.any()


def test_merge_refuses_another_width():
    with pytest.raises(ShapeError, match=r"second moment to merge has shape \(3, 3\); expected \(2, 2\)"):
        moments_of(torch.ones(1, 2)).merge(moments_of(torch.ones(1, 3)))


@pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 2, 3)])
def test_add_refuses_another_width(shape):
    with pytest.raises(ShapeError, match=r"expected \(tokens, 3\).*keep its input width"):
        MomentsAccumulator(3).add(torch.zeros(shape))


def test_statistics_without_tokens_are_refused():
    with pytest.raises(StatsError, match=r"hold 0 tokens; expected at least 1\. Pass calibration batches"):
        LayerStats(MomentsAccumulator(3).moments())
    with pytest.raises(StatsError, match="0 tokens"):
        LayerStats.from_hessian(torch.eye(2), tokens=0)


@pytest.mark.parametrize("name", ["H", "G"])
@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(2, 3), StatsError, r"of shape \(2, 3\) is not symmetric"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), StatsError, "is not symmetric; expected a mean of x xᵀ"),
        (torch.diag(torch.tensor([1.0, -1.0])), StatsError, "negative diagonal entry"),
        (torch.tensor([[1.0, 1.5], [1.5, 1.0]]), StatsError, r"eigenvalue below -0.00015; expected a mean of x xᵀ"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), NonFiniteError, "1 NaN or Inf of 4 entries"),
        (torch.ones(3), ShapeError, "expected a floating-point matrix"),
        (torch.eye(2, dtype=torch.int64), ShapeError, "torch.int64"),
    ],
)
def test_from_hessian_refuses(name, matrix, error, message):
    H, G = (matrix, None) if name == "H" else (torch.eye(2), matrix)
    with pytest.raises(error, match=rf"^{name} .*{message}"):
        LayerStats.from_hessian(H, G, tokens=5)


def test_from_hessian_copies_and_takes_rounding_asymmetry():
    H = torch.eye(3)
    H[0, 1] = 1e-6
    stats = LayerStats.from_hessian(H, torch.eye(2), tokens=5)
    H[0, 0] = 7
    assert stats.hessian.dtype == torch.float64
    assert stats.hessian[0, 0] == 1
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert (stats.tokens, stats.heldout) == (5, None)


def test_layer_stats_merge_every_part():
    x, y = moments_of(torch.ones(1, 2)), moments_of(3 * torch.ones(1, 2))
    merged = LayerStats(x, x, None).merge(LayerStats(y, y, y))
    for part in (merged.inputs, merged.heldout):
        assert (float(part.second[0, 1]), part.tokens) == (5.0, 2)
    assert merged.gradient is y
    assert LayerStats(x, x, y).merge(LayerStats(y)).heldout is x


def test_check_weight():
    stats = LayerStats.from_hessian(torch.eye(3), torch.eye(2), tokens=1)
    stats.check_weight(torch.ones(2, 3))
    with pytest.raises(StatsError, match=r"in_features=3; the weight has shape \(3, 2\)\. Pass the statistics of this"):
        stats.check_weight(torch.ones(3, 2))
    with pytest.raises(StatsError, match=r"G is of a layer with out_features=2; the weight has shape \(3, 3\)"):
        stats.check_weight(torch.ones(3, 3))


def test_cross_moments_pair_tokens_and_merge():
    generator = torch.Generator().manual_seed(0)
    x, dense = (torch.randn(9, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    parts = []
    for rows in (slice(0, 4), slice(4, 9)):
        sums = MomentsAccumulator(3)
        sums.add(x[rows], dense[rows])
        parts.append(sums.moments())
    merged = parts[0].merge(parts[1])
    assert torch.allclose(merged.cross, dense.T @ x / 9)
    assert torch.allclose(merged.over(18).cross, dense.T @ x / 18)
    assert parts[0].merge(Moments(torch.eye(3).double(), None, 2)).cross is None
    sums.add(x[:2])  # these have no partner
    assert sums.moments().cross is None
    other = MomentsAccumulator(3)
    other.add(x, dense[:5])
    assert other.moments().cross is None


def test_statistics_follow_to_another_device():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments(x.T @ x / 9, x.abs().mean(0), 9, cross=x.T @ x)
    stats = LayerStats(moments, moments, None, ("a note",))
    assert stats.to(torch.device("cpu")) is stats
    moved = stats.to(torch.device("meta"))
    assert (moved.inputs.tokens, moved.gradient, moved.notes) == (9, None, ("a note",))
    for each in (moved.inputs, moved.heldout):
        assert {t.device.type for t in (each.second, each.mean_abs, each.cross)} == {"meta"}
