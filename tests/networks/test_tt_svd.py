"""TT-SVD against brute force, TensorLy, and the defects of its peers."""

import numpy
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train_matrix

from tnc.errors import BudgetError, LawError, NonFiniteError, RankError, ShapeError
from tnc.networks import gram, krylov, truncate, tt_svd, tt_svd_batched, tt_svd_with_report
from tnc.terms import Mpo, dense64
from tnc.testing import check_mpo_batch, check_mpo_decomposer, check_mpo_tolerance, mpo_cases


def by_rank(weight, out_modes, in_modes, rank):
    return tt_svd(weight, out_modes, in_modes, max_rank=rank)


def test_every_law_of_a_decomposer_by_rank():
    check_mpo_decomposer(by_rank, max_examples=settings.default.max_examples)


def test_every_law_of_a_decomposer_by_tolerance():
    def by_tolerance(weight, out_modes, in_modes, eps):
        return tt_svd(weight, out_modes, in_modes, eps=eps)

    check_mpo_tolerance(by_tolerance, max_examples=settings.default.max_examples)


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        ("form_is_kept", lambda w, o, i, r: Mpo(by_rank(w, o, i, r).cores, None)),
        ("ranks_are_bounded", lambda w, o, i, r: tt_svd(w, o, i, max_rank=r + 1)),
        ("full_rank_reconstructs|quasi_optimal", lambda w, o, i, r: tt_svd(w, o, i, max_rank=max(r - 1, 1))),
        ("full_rank_reconstructs", lambda w, o, i, r: tt_svd(w.bfloat16(), o, i, max_rank=r, dtype=w.dtype)),
        ("zero_stays_zero", lambda w, o, i, r: tt_svd(w + 1e-9, o, i, max_rank=r)),
    ],
)
def test_a_broken_decomposer_is_seen(law, broken):
    with pytest.raises(LawError, match=law):
        check_mpo_decomposer(broken, max_examples=30)


@given(case=mpo_cases())
def test_the_reported_error_is_an_upper_bound_and_without_padding_exact(case):
    fit = tt_svd_with_report(case.weight, case.out_modes, case.in_modes, max_rank=case.rank, dtype=torch.float64)
    size = float(case.weight.double().norm())
    error = float((case.weight.double() - dense64(fit.mpo)).norm()) / size if size else 0.0
    assert error <= fit.error + 1e-7
    if not fit.mpo.padded:
        assert error == pytest.approx(fit.error, abs=1e-7)


@given(case=mpo_cases())
def test_left_cores_are_orthonormal(case):
    fit = tt_svd_with_report(case.weight, case.out_modes, case.in_modes, max_rank=case.rank, dtype=torch.float64)
    for core in fit.mpo.cores[:-1]:
        columns = core.flatten(0, 2)
        torch.testing.assert_close(columns.mT @ columns, torch.eye(columns.shape[1], dtype=torch.float64))


def batched(weights, outs, ins, rank):
    return [fit.mpo for fit in tt_svd_batched(weights, outs, ins, max_rank=rank)]


def test_batched_equals_looped():
    assert check_mpo_batch(batched, by_rank) == ("a_batch_is_a_loop",)
    with pytest.raises(LawError, match="a_batch_is_a_loop"):
        check_mpo_batch(lambda weights, *rest: batched(weights, *rest)[::-1], by_rank)


@pytest.mark.parametrize(
    ("out_modes", "in_modes"), [((4, 6), (5, 4)), ((2, 3, 4), (5, 2, 2)), ((3, 2, 2, 2), (1, 5, 2, 2))]
)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_error_is_that_of_tensorly(out_modes, in_modes, rank):
    weight = torch.randn(24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    d = len(out_modes)
    theirs = tensor_train_matrix(weight.numpy().reshape(*out_modes, *in_modes), [1, *[rank] * (d - 1), 1])
    expected = numpy.linalg.norm(weight.numpy() - tensorly.tt_matrix_to_matrix(theirs))
    ours = float((weight - dense64(tt_svd(weight, out_modes, in_modes, max_rank=rank))).norm())
    assert ours == pytest.approx(expected, rel=1e-9)


def decaying(rows, columns, *, rate, seed=0):
    """A matrix whose (two-site) unfolding has singular values ``rate**k``."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    count = min(rows, columns)
    return U[:, :count] * rate ** torch.arange(count, dtype=torch.float64) @ V[:, :count].T


def test_float32_meets_a_tolerance_of_a_millionth():
    unfolding = decaying(60, 60, rate=0.7)
    weight = unfolding.reshape(6, 10, 6, 10).permute(0, 2, 1, 3).reshape(36, 100).float()
    fit = tt_svd_with_report(weight, (6, 6), (10, 10), eps=1e-6)
    error = float((weight.double() - dense64(fit.mpo)).norm() / weight.double().norm())
    assert error <= 1e-6
    assert fit.mpo.ranks[1] < 60
    assert any("exact SVD" in note for note in fit.notes)


def test_same_rank_loses_no_precision():
    exact = decaying(30, 30, rate=0.01)[:, :].clone()
    weight = exact.reshape(5, 6, 5, 6).permute(0, 2, 1, 3).reshape(25, 36)
    found = tt_svd(weight, (5, 5), (6, 6), max_rank=7)
    assert float((weight - dense64(found)).norm()) < 2e-14  # the tail itself is 1e-14; a Gram matrix alone gives 1e-9


def test_bfloat16_cannot_meet_a_tight_tolerance_and_says_so():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with pytest.raises(BudgetError, match="wider dtype"):
        tt_svd(weight, (4, 4), (4, 4), eps=1e-4)


def test_a_rank_limit_that_breaks_the_tolerance_is_reported():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    fit = tt_svd_with_report(weight, (4, 4), (4, 4), eps=0.01, max_rank=2)
    assert fit.mpo.ranks == (1, 2, 1)
    assert any("max_rank=2" in note for note in fit.notes)


def test_ranks_may_be_listed_and_numpy_integers_do_not_leak():
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    found = tt_svd(weight, (2, 3, 4), (4, 3, 2), max_rank=[numpy.int64(2), numpy.int64(5)])
    assert found.ranks == (1, 2, 5, 1)
    assert all(type(rank) is int for rank in (*found.ranks, *found.out_modes))


def test_default_modes_are_balanced():
    assert tt_svd(torch.eye(64), max_rank=1).out_modes == (8, 8)
    assert tt_svd(torch.eye(13), in_modes=(2, 2, 4), max_rank=1).out_modes == (2, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out_modes": (3, 5), "in_modes": (4, 4)}, ShapeError, r"\(4, 4\)"),
        ({"out_modes": (4, 4), "in_modes": (16,)}, ShapeError, "one output and one input mode"),
        ({"out_modes": (4, 0), "in_modes": (4, 4)}, ShapeError, "integers of at least 1"),
        ({"out_modes": (4, 4), "in_modes": (4, 4), "max_rank": 0}, RankError, "positive integer"),
        ({"out_modes": (4, 4), "in_modes": (4, 4), "max_rank": 2.5}, RankError, "positive integer"),
        ({"out_modes": (4, 4), "in_modes": (4, 4), "max_rank": [2, 2]}, RankError, "1 of them"),
        ({"out_modes": (4, 4), "in_modes": (4, 4), "eps": 1.0}, BudgetError, r"\[0, 1\)"),
    ],
)
def test_wrong_arguments_name_what_is_right(arguments, error, message):
    with pytest.raises(error, match=message):
        tt_svd(torch.ones(16, 16), **arguments)


def test_nan_is_refused():
    with pytest.raises(NonFiniteError):
        tt_svd(torch.full((4, 4), float("nan")))
    with pytest.raises(NonFiniteError):
        tt_svd_batched(torch.full((2, 4, 4), float("inf")), (2, 2), (2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "tail"), [(20, None), (100, 1e-2), (10, 1e-2), (30, None)])
def test_krylov_reaches_the_optimum(monkeypatch, dtype, rank, tail):
    monkeypatch.setattr(truncate, "_GRAM_LIMIT", 100)
    monkeypatch.setattr(krylov, "_BLOCK", 8)
    matrix = decaying(240, 260, rate=0.9).to(dtype)
    found = truncate.split(matrix, rank, tail)
    values = torch.linalg.svdvals(matrix.double()).square()
    left = values.sum() - values.cumsum(0)
    keep = found.basis.shape[1]
    if tail is not None and keep < rank:
        assert keep == int((left > tail).sum()) + 1
    assert float(found.tail) <= float(left[keep - 1]) * 1.001 + 1e-12
    error = (matrix.double() - found.basis.double() @ found.rest.double()).square().sum()
    assert float(error) == pytest.approx(float(found.tail), rel=2e-2, abs=1e-10)


@pytest.mark.parametrize("tail", [None, 1e-8])
def test_krylov_leaves_tiny_tails_to_finer_solvers(monkeypatch, tail):
    monkeypatch.setattr(truncate, "_GRAM_LIMIT", 100)
    matrix = decaying(120, 260, rate=0.5).float()
    found = truncate.split(matrix, 18, tail)
    error = (matrix.double() - found.basis.double() @ found.rest.double()).norm()
    assert float(error) <= max(1.01 * 0.5 ** found.basis.shape[1] / 0.75**0.5, 1e-6)
    assert found.basis.shape[1] == (18 if tail is None else 14)


def test_no_gram_matrix_is_tried_for_a_tail_that_float32_did_not_resolve(monkeypatch):
    monkeypatch.setattr(truncate, "_GRAM_LIMIT", 100)
    monkeypatch.setattr(truncate, "_by_gram", None)
    found = truncate.split(decaying(240, 260, rate=0.5).float(), 10)
    assert found.basis.dtype == torch.float32
    assert float(found.tail) == pytest.approx(0.25**10 / 0.75, rel=1e-2)


def test_krylov_of_a_zero_matrix(monkeypatch):
    monkeypatch.setattr(truncate, "_GRAM_LIMIT", 100)
    found = truncate.split(torch.zeros(120, 130), 10)
    assert found.basis.shape == (120, 10)
    assert not found.rest.any()


def test_eps_truncates_where_the_sweep_needs_a_krylov_space() -> None:
    """Unfoldings above the size of a whole eigenproblem take another solver, and must keep as few directions."""
    generator = torch.Generator().manual_seed(0)
    unfolding = torch.randn(1296, 5, generator=generator) @ torch.randn(5, 1296, generator=generator)
    weight = unfolding.reshape(36, 36, 36, 36).permute(0, 2, 1, 3).reshape(1296, 1296)
    assert tt_svd(weight, (36, 36), (36, 36), eps=0.01).ranks[1] <= 5


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 5), (2, 37, 90), (130, 9001)])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 4 * 2.0**-24), (torch.float64, 1e-14)])
def test_gram_by_bands_and_chunks_is_the_product(shape, precision, tolerance):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    wide = matrix.double()
    found, expected = gram.row_gram(matrix, precision), wide @ wide.mT
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    torch.testing.assert_close(gram.energy(matrix), wide.square().sum((-2, -1)), rtol=1e-13, atol=0.0)


@given(tail=st.floats(-9, -0.5), turned=st.booleans(), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_float32_split_of_any_tail_is_as_good_as_the_float64_svd(tail, turned, scale):
    """Whatever precision the tail needs is found: 8 directions, then a plateau of squared norm ``10**tail``."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(300, 40, generator=generator, dtype=torch.float64)).Q
    sigma = torch.full((40,), (10**tail / 32) ** 0.5, dtype=torch.float64)
    sigma[:8] = 8**-0.5
    matrix = (scale * (U * sigma) @ V.T).float()
    matrix = matrix.T.contiguous() if turned else matrix
    found = truncate.split(matrix, 8)
    best = float(torch.linalg.svdvals(matrix.double())[8:].square().sum())
    error = float((matrix.double() - found.basis.double() @ found.rest.double()).square().sum())
    rounding = 1e-13 * scale**2  # of a float32 rest
    assert error <= 1.0001**2 * best + rounding
    assert float(found.tail) == pytest.approx(best, rel=1e-3, abs=rounding)


def test_a_float32_spectrum_that_promises_too_much_is_not_believed(monkeypatch):
    exact = truncate.row_gram
    too_small = {torch.float32: 0.25, torch.float64: 1.0}
    monkeypatch.setattr(truncate, "row_gram", lambda matrix, precision: too_small[precision] * exact(matrix, precision))
    matrix = decaying(40, 300, rate=0.9).float()
    found = truncate.split(matrix, 40, 1e-2)
    error = (matrix.double() - found.basis.double() @ found.rest.double()).square().sum()
    assert float(error) <= 1e-2
    assert float(found.tail) == pytest.approx(float(error), rel=1e-3)


def test_a_tail_above_the_energy_keeps_one_direction():
    assert truncate.split(torch.ones(4, 5), 3, 100.0).basis.shape == (4, 1)
