"""Cross approximation: exact where the ranks suffice, near TT-SVD elsewhere, from few entries, and honest about it."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from tensorly import tt_to_tensor
from tensorly.contrib.decomposition import tensor_train_cross

from tnc.errors import BudgetError, NonFiniteError, RankError, ShapeError
from tnc.networks import Entries, OperatorEntries, mpo_cross, tt_svd_with_report
from tnc.networks.entries import mpo_entries
from tnc.networks.pivots import CrossPivots
from tnc.terms import Mpo, dense64
from tnc.testing import check_mpo_approximation, mpos
from tnc.testing.mpo_laws import mode_lists

FEW = settings(max_examples=max(settings.default.max_examples // 4, 10))
DOUBLE = torch.float64


class Read:
    """Entries of a matrix, with the places that were ever asked for."""

    def __init__(self, weight):
        self.weight, self.seen, self.count = weight, torch.zeros(weight.shape, dtype=torch.bool), 0

    def __call__(self, rows, columns):
        self.seen[rows, columns] = True
        self.count += len(rows)
        return self.weight[rows, columns]


def entries(weight, **options):
    return Entries(lambda rows, columns: weight[rows, columns], tuple(weight.shape), **options)


def relative(weight, mpo):
    return float((weight - dense64(mpo)).norm() / weight.norm())


def decaying(outs, ins, rate, seed):
    """Singular values ``rate**k`` at the first bond."""
    generator = torch.Generator().manual_seed(seed)
    first, rest = outs[0] * ins[0], outs[1] * ins[1]
    U = torch.linalg.qr(torch.randn(first, first, generator=generator, dtype=DOUBLE)).Q
    V = torch.linalg.qr(torch.randn(rest, rest, generator=generator, dtype=DOUBLE)).Q
    count = min(first, rest)
    sites = U[:, :count] * rate ** torch.arange(count, dtype=DOUBLE) @ V[:, :count].T
    return (
        sites.reshape(outs[0], ins[0], outs[1], ins[1]).permute(0, 2, 1, 3).reshape(outs[0] * outs[1], ins[0] * ins[1])
    )


def kernel(size):
    """``1 / (1 + |x - y|)``: not smooth, so of full rank; (size, size)."""
    x = torch.linspace(0, 10, size, dtype=DOUBLE)
    return 1 / (1 + (x[:, None] - x).abs())


def test_every_law_of_an_approximation_by_rank():
    def by_rank(weight, out_modes, in_modes, rank):
        return mpo_cross(entries(weight), out_modes, in_modes, max_rank=rank, dtype=weight.dtype).mpo

    check_mpo_approximation(by_rank, max_examples=settings.default.max_examples)


@given(mpo=mpos(most=3), scale=st.sampled_from((1e-6, 1.0, 1e6)), seed=st.integers(0, 99))
def test_an_operator_of_small_bonds_is_recovered(mpo, scale, seed):
    weight = scale * mpo.to_dense()
    room = 3 if not mpo.padded else 12  # zeros in the padding may multiply every bond by four
    fit = mpo_cross(entries(weight), mpo.out_modes, mpo.in_modes, max_rank=room, dtype=DOUBLE, seed=seed)
    assert float((weight - dense64(fit.mpo)).norm()) <= 1e-10 * float(weight.norm())
    assert fit.error <= 1e-9
    assert all(rank <= room for rank in fit.mpo.ranks)
    if not mpo.padded:
        found = mpo_cross(entries(weight), mpo.out_modes, mpo.in_modes, eps=1e-8, dtype=DOUBLE, seed=seed)
        assert all(a <= b for a, b in zip(found.pivots, mpo.ranks[1:-1], strict=True))


@given(
    modes=st.sampled_from((((6, 8), (8, 6)), ((12, 4), (3, 16)), ((47, 1), (1, 40)), ((1, 48), (48, 1)))),
    rate=st.sampled_from((0.5, 0.7, 0.9)), rank=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
@FEW
def test_the_error_is_near_that_of_tt_svd(modes, rate, rank, seed):
    weight = decaying(*modes, rate, seed)
    fit = mpo_cross(entries(weight), *modes, max_rank=rank, dtype=DOUBLE, oversample=1.0, seed=seed)
    best = tt_svd_with_report(weight, *modes, max_rank=rank).error
    assert best * (1 - 1e-9) <= relative(weight, fit.mpo) <= 2 * best + 1e-12


@pytest.mark.parametrize("modes", [(16, 16), (4, 8, 8), (4, 4, 4, 4)])
def test_a_kernel_matrix_takes_a_few_of_its_entries(modes):
    weight = kernel(256)
    read = Read(weight)
    source = Entries(read, (256, 256), samples=500)
    fit = mpo_cross(source, modes, modes, max_rank=8, dtype=DOUBLE)
    best = tt_svd_with_report(weight, modes, modes, max_rank=8).error
    assert relative(weight, fit.mpo) <= 1.5 * best
    assert fit.reads == read.count
    assert float(read.seen.double().mean()) < 0.25
    assert abs(fit.error - relative(weight, fit.mpo)) <= 4 * fit.standard_error
    tensor = weight.numpy().reshape(*modes, *modes)
    d = len(modes)
    sites = tensor.transpose([leg for k in range(d) for leg in (k, d + k)]).reshape([m * m for m in modes])
    theirs = tt_to_tensor(tensor_train_cross(sites, [1, *fit.mpo.ranks[1:-1], 1], random_state=0))
    assert relative(weight, fit.mpo) <= numpy.linalg.norm(theirs - sites) / numpy.linalg.norm(sites)


@pytest.mark.parametrize("eps", [0.1, 1e-3, 1e-6])
def test_a_tolerance_is_met(eps):
    weight = kernel(240)
    modes = ((12, 20), (4, 5, 12))
    for outs in modes:
        fit = mpo_cross(entries(weight, samples=1000), outs, outs[::-1], eps=eps, dtype=DOUBLE)
        assert relative(weight, fit.mpo) <= eps
        assert not fit.notes
        best = tt_svd_with_report(weight, outs, outs[::-1], eps=eps).mpo
        assert fit.mpo.params <= 1.5 * best.params


def test_a_tolerance_out_of_reach_is_a_note():
    fit = mpo_cross(entries(kernel(64)), (8, 8), (8, 8), eps=1e-6, max_rank=2)
    assert fit.mpo.ranks == (1, 2, 1)
    assert any("above eps=1e-06 with max_rank=2" in note for note in fit.notes)


@given(shape=st.sampled_from(((13, 7), (1, 5), (23, 24))), seed=st.integers(0, 9), data=st.data())
@FEW
def test_padding_is_not_read(shape, seed, data):
    """A function that is asked for a place outside would raise."""
    d = data.draw(st.integers(1, 3))
    modes = data.draw(mode_lists(shape[0], d)), data.draw(mode_lists(shape[1], d))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    fit = mpo_cross(entries(weight), *modes, max_rank=1000, dtype=DOUBLE, seed=seed)
    torch.testing.assert_close(dense64(fit.mpo), weight)
    assert any("padding" in note for note in fit.notes) == fit.mpo.padded


def test_bonds_around_a_site_of_size_one_do_not_wait_for_each_other():
    weight = torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=DOUBLE)
    fit = mpo_cross(entries(weight), (1, 1, 2), (2, 1, 1), max_rank=2, dtype=DOUBLE)
    torch.testing.assert_close(dense64(fit.mpo), weight)


def test_the_zero_matrix():
    fit = mpo_cross(entries(torch.zeros(24, 24)), (4, 6), (6, 4), max_rank=3)
    assert not fit.mpo.to_dense().any()
    assert (fit.error, fit.notes) == (0.0, ("every entry read was zero",))


def test_rows_and_columns_of_a_map_make_a_low_rank_factorization():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((200, 6), (6, 150)))
    weight = left @ right
    source = OperatorEntries(aslinearoperator(weight.numpy()))
    fit = mpo_cross(source, (200, 1), (1, 150), max_rank=10, dtype=DOUBLE)
    assert fit.pivots == (6,)
    assert relative(weight, fit.mpo) <= 1e-12
    assert fit.reads < 100  # of 150 + 200 that give every column and every row


@given(seed=st.integers(0, 99), modes=st.sampled_from((((6, 4), (4, 6)), ((24, 1), (1, 24)), ((1, 2, 12), (6, 4, 1)))))
@FEW
def test_a_map_is_read_as_its_matrix_is(seed, modes):
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    weight *= 0.7 ** torch.arange(24, dtype=DOUBLE)
    source = OperatorEntries(aslinearoperator(weight.numpy()), directions=24)
    places = torch.randint(24, (2, 40), generator=torch.Generator().manual_seed(seed))
    values, products = source.read(*places)
    assert torch.equal(values, weight[places[0], places[1]])
    assert products == min(len(side.unique()) for side in places)
    fit = mpo_cross(source, *modes, max_rank=5, dtype=DOUBLE, seed=seed)
    assert fit.error == pytest.approx(relative(weight, fit.mpo), rel=1e-9)
    assert fit.standard_error == 0


@pytest.mark.parametrize("make", [entries, lambda weight: OperatorEntries(aslinearoperator(weight.numpy()))])
def test_the_estimate_is_unbiased_and_knows_its_spread(make):
    weight = kernel(80)
    mpo = tt_svd_with_report(weight, (8, 10), (10, 8), max_rank=2).mpo
    source, generator = make(weight), torch.Generator().manual_seed(0)
    probes = [source.probe(generator).error(mpo) for _ in range(40)]
    true = relative(weight, mpo)
    mean = sum(each.error for each in probes) / len(probes)
    spread = sum(each.standard_error for each in probes) / len(probes)
    assert mean == pytest.approx(true, rel=0.05)
    assert sum(abs(each.error - true) <= 2 * each.standard_error for each in probes) >= 32
    assert 0 < spread < 0.3 * true


@given(mpo=mpos(), seed=st.integers(0, 99))
@FEW
def test_entries_of_an_operator_are_those_of_its_matrix(mpo, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(size, (30,), generator=generator) for size in mpo.shape)
    torch.testing.assert_close(mpo_entries(mpo, rows, columns), mpo.to_dense()[rows, columns])


def test_the_same_seed_reads_the_same_places():
    weight = kernel(64).float()
    first, second = (mpo_cross(entries(weight), (8, 8), (8, 8), max_rank=3, seed=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.mpo.cores, second.mpo.cores, strict=True))
    assert all(core.dtype == torch.float32 for core in first.mpo.cores)
    numpy_values = Entries(lambda r, c: weight.numpy()[r.numpy(), c.numpy()], (64, 64))
    assert torch.equal(mpo_cross(numpy_values, (8, 8), (8, 8), max_rank=3, seed=7).mpo.cores[0], first.mpo.cores[0])


def test_input_is_checked():
    source = entries(kernel(24))
    with pytest.raises(BudgetError, match="expected max_rank, eps or both"):
        mpo_cross(source, (4, 6), (6, 4))
    with pytest.raises(BudgetError, match="oversample >= 0"):
        mpo_cross(source, (4, 6), (6, 4), max_rank=2, oversample=-1)
    with pytest.raises(BudgetError, match=r"\[0, 1\)"):
        mpo_cross(source, (4, 6), (6, 4), eps=1.5)
    with pytest.raises(RankError, match="positive integer"):
        mpo_cross(source, (4, 6), (6, 4), max_rank=0)
    with pytest.raises(ShapeError, match="Factorizations"):
        mpo_cross(source, (4, 5), (6, 4), max_rank=2)
    with pytest.raises(NonFiniteError, match="entries"):
        mpo_cross(entries(torch.full((24, 24), float("nan"))), (4, 6), (6, 4), max_rank=2)
    with pytest.raises(ShapeError, match="entries came back as"):
        mpo_cross(Entries(lambda rows, columns: torch.ones(3), (24, 24)), (4, 6), (6, 4), max_rank=2)
    with pytest.raises(ShapeError, match="real numbers"):
        mpo_cross(entries(kernel(24) * 1j), (4, 6), (6, 4), max_rank=2)
    flawed = LinearOperator((24, 24), matvec=lambda x: x * float("nan"), rmatvec=lambda x: x, dtype=float)
    with pytest.raises(NonFiniteError, match="product"):
        mpo_cross(OperatorEntries(flawed), (4, 6), (6, 4), max_rank=2)

    class Short:
        shape = (24, 24)

        def matmat(self, columns):
            return columns[:5]

        rmatmat = matmat

    with pytest.raises(ShapeError, match=r"product came back .* expected real numbers of shape \(24, 16\)"):
        mpo_cross(OperatorEntries(Short()), (4, 6), (6, 4), max_rank=2)


def test_an_mpo_is_what_comes_back():
    assert isinstance(mpo_cross(entries(kernel(9)), (9,), (9,), max_rank=1, dtype=DOUBLE).mpo, Mpo)


@given(seed=st.integers(0, 99), pivots=st.integers(0, 6))
@FEW
def test_searched_rows_and_columns_show_the_error_of_the_interpolation(seed, pivots):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    cross = CrossPivots(entries(weight), (4, 4), (4, 6), torch.Generator().manual_seed(seed))
    assert cross.start((3, 5))
    assert all(cross.add_pivot(1) for _ in range(pivots))
    unfolding = (weight - cross.mpo().to_dense()).reshape(4, 4, 4, 6).permute(0, 2, 1, 3).reshape(16, 24)
    for i, j in ((0, 0), (7, 11), (15, 23)):
        torch.testing.assert_close(cross.row(1, i)[1], unfolding[i])
        torch.testing.assert_close(cross.column(1, j)[1], unfolding[:, j])
    at = cross.lefts[1][:, 0] // 4 * 4 + cross.lefts[1][:, 1] // 6  # the site offsets of the rows as indices
    assert float(unfolding[at].abs().max()) < 1e-10  # interpolation: nothing is left on a pivot row


def test_the_search_starts_where_random_places_are_worst():
    """With so many draws that every place is looked at, it is full pivoting."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    cross = CrossPivots(entries(weight, draws=500), (4, 1), (1, 4), torch.Generator().manual_seed(1))
    assert cross.start((0, 0))
    for _ in range(3):
        rest = (weight - cross.mpo().to_dense()).abs()
        assert cross.drawn_column(1) == int(rest.max(0).values.argmax())
        assert cross.add_pivot(1)
    assert not cross.add_pivot(1)
