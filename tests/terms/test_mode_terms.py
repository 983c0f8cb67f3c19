"""`TensorRing`, `Tucker` and `Cp` against TensorLy, their shape errors, and the einsum kernel on them."""

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import ShapeError
from tnc.kernels import choose
from tnc.terms import Cp, Mpo, TensorRing, Tucker, dense64
from tnc.testing import check_term, expressions
from tnc.testing.oracle import magnitude

KINDS = ("tensor_ring", "tucker", "cp")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(term=expressions(kinds=KINDS, depth=0))
def test_laws(term):
    check_term(term)


@settings(max_examples=40, deadline=None)
@given(term=expressions(kinds=(*KINDS, "mpo"), depth=1), tokens=st.sampled_from((0, 1, 3, 70)))
def test_the_einsum_kernel_contracts_them(term, tokens):
    x = gaussian(tokens, term.shape[1])
    bound, _ = choose(term, torch.device("cpu"), x.dtype, backend="einsum")
    excess = (bound(x, term.tensors()) - x @ dense64(term).T).abs() - 1e-10 * (x.abs() @ magnitude(term).T)
    assert not bool((excess > 0).any())


def test_tensorly_agrees():
    """Its tensors have one leg a mode; ours order output modes before input modes."""
    factors = [gaussian(size, 5, seed=k) for k, size in enumerate((2, 3, 4, 2))]
    expected = tensorly.cp_to_tensor((np.ones(5), [f.numpy() for f in factors]))
    np.testing.assert_allclose(Cp(tuple(factors)).to_dense(), expected.reshape(6, 8))

    ranks = (2, 3, 1, 2)
    core = gaussian(*ranks, seed=9)
    factors = [gaussian(n, r, seed=k) for k, (n, r) in enumerate(zip((2, 3, 4, 2), ranks, strict=True))]
    expected = tensorly.tucker_to_tensor((core.numpy(), [f.numpy() for f in factors]))
    np.testing.assert_allclose(Tucker(core, tuple(factors)).to_dense(), expected.reshape(6, 8))

    cores = [gaussian(2, 2, 4, 3, seed=1), gaussian(3, 3, 2, 1, seed=2), gaussian(1, 1, 3, 2, seed=3)]
    merged = tensorly.tr_to_tensor([core.flatten(1, 2).numpy() for core in cores]).reshape(2, 4, 3, 2, 1, 3)
    expected = merged.transpose(0, 2, 4, 1, 3, 5).reshape(6, 24)
    np.testing.assert_allclose(TensorRing(tuple(cores)).to_dense(), expected)


def test_a_ring_with_a_closing_bond_of_one_is_an_mpo():
    cores = (gaussian(1, 2, 4, 3, seed=1), gaussian(3, 3, 2, 1, seed=2))
    torch.testing.assert_close(TensorRing(cores).to_dense(), Mpo(cores).to_dense())


def test_rank_zero_is_the_zero_matrix():
    for term in (Cp((torch.zeros(2, 0), torch.zeros(3, 0))), TensorRing((torch.zeros(0, 2, 3, 0),)),
                 Tucker(torch.zeros(0, 0), (torch.zeros(2, 0), torch.zeros(3, 0)))):  # fmt: skip
        assert torch.equal(term.to_dense(), torch.zeros(2, 3)) and term.storage_bits == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [(lambda: TensorRing((torch.zeros(2, 1, 1, 3),)), r"TensorRing got cores .*and the last to the first"),
     (lambda: TensorRing(()), r"TensorRing got cores of shapes \[\]"),
     (lambda: Tucker(torch.zeros(2, 2), (torch.zeros(3, 2), torch.zeros(3, 1))), r"Tucker got a core .* one leg r for"),
     (lambda: Cp((torch.zeros(3, 2), torch.zeros(3, 1))), r"Cp got factors .* of one rank"),
     (lambda: Cp((torch.zeros(3, 2),)), r"expected an even number")],
)  # fmt: skip
def test_factors_must_fit(build, message):
    with pytest.raises(ShapeError, match=message):
        build()
