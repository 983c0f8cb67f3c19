"""Operators known by their products: the same as TT-SVD of the matrix, which is never formed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator

from tnc.errors import NonFiniteError, ShapeError
from tnc.networks import tt_svd_of_operator, tt_svd_with_report
from tnc.terms import dense64

MODES = st.sampled_from(
    (
        ((4, 6), (6, 4)), ((1, 12), (3, 2)), ((7, 5), (1, 11)), ((2, 3, 4), (4, 3, 2)), ((2, 2, 2, 3), (3, 1, 2, 2)),
    )
)  # fmt: skip
FEW = settings(max_examples=max(settings.default.max_examples // 4, 10))


def matrix(modes, seed, decay):
    (outs, ins), generator = modes, torch.Generator().manual_seed(seed)
    m, n = int(torch.tensor(outs).prod()), int(torch.tensor(ins).prod())
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U * decay ** torch.arange(len(s), dtype=torch.float64) @ Vh


class Counted:
    """A map that records how many columns it was ever asked for at once."""

    def __init__(self, weight):
        self.weight, self.widest = weight.numpy(), 0

    @property
    def shape(self):
        return self.weight.shape

    def matmat(self, columns):
        self.widest = max(self.widest, columns.shape[1])
        return self.weight @ columns


@given(modes=MODES, seed=st.integers(0, 99), rank=st.integers(1, 12))
@FEW
def test_the_error_is_exact_and_near_that_of_tt_svd(modes, seed, rank):
    weight = matrix(modes, seed, 0.8)
    fit = tt_svd_of_operator(aslinearoperator(weight.numpy()), *modes, max_rank=rank, dtype=torch.float64)
    assert (fit.mpo.out_modes, fit.mpo.in_modes) == modes
    assert max(fit.mpo.ranks) <= rank
    error = float((weight - dense64(fit.mpo)).norm() / weight.norm())
    assert fit.error == pytest.approx(error, abs=1e-7)
    assert error <= 1.05 * tt_svd_with_report(weight, *modes, max_rank=rank).error * len(modes[0]) ** 0.5 + 1e-7


@given(modes=MODES, seed=st.integers(0, 99), eps=st.sampled_from((0.5, 0.1, 1e-3)))
@FEW
def test_a_tolerance_is_met_or_reported(modes, seed, eps):
    weight = matrix(modes, seed, 0.6)
    fit = tt_svd_of_operator(Counted(weight), *modes, max_rank=40, eps=eps, dtype=torch.float64)
    error = float((weight - dense64(fit.mpo)).norm() / weight.norm())
    assert error <= eps * (1 + 1e-7)
    assert not fit.notes
    tight = tt_svd_of_operator(Counted(weight), *modes, max_rank=1, eps=1e-9)
    assert (tight.error > 1e-9) == bool(tight.notes)


def test_the_matrix_is_never_read_whole():
    counted = Counted(matrix(((4, 6), (6, 4)), 0, 0.8))
    fit = tt_svd_of_operator(counted, (4, 6), (6, 4), max_rank=3, seed=5)
    assert counted.widest == 4
    assert all(core.dtype == torch.float32 for core in fit.mpo.cores)
    again = tt_svd_of_operator(counted, (4, 6), (6, 4), max_rank=3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(fit.mpo.cores, again.mpo.cores, strict=True))


def test_the_zero_map():
    fit = tt_svd_of_operator(Counted(torch.zeros(24, 24, dtype=torch.float64)), (4, 6), (6, 4), max_rank=3)
    assert not fit.mpo.to_dense().any()
    assert fit.error == 0


def test_input_is_checked():
    counted = Counted(torch.ones(24, 24, dtype=torch.float64))
    with pytest.raises(ShapeError, match="two modes or more"):
        tt_svd_of_operator(counted, (24,), (24,), max_rank=3)
    with pytest.raises(ShapeError, match="exactly"):
        tt_svd_of_operator(counted, (5, 5), (6, 4), max_rank=3)
    with pytest.raises(NonFiniteError, match="product"):
        tt_svd_of_operator(Counted(torch.full((4, 4), float("nan"), dtype=torch.float64)), (2, 2), (2, 2), max_rank=1)
