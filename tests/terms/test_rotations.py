"""`Hadamard` and `Permutation` against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import ShapeError
from tnc.formats import pack
from tnc.hadamard import hadamard_matrix
from tnc.terms import Dense, Hadamard, Permutation, Product, dense64


def test_hadamard_by_hand():
    term = Hadamard(pack(torch.tensor([0, 1, 0, 0]), 1), 4, (2,))
    half = 0.5**0.5
    expected = torch.tensor([[1, -1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, -1]], dtype=torch.float64) * half
    torch.testing.assert_close(term.to_dense(), expected)
    torch.testing.assert_close(term.inverse().to_dense(), expected.T)
    assert term.shape == (4, 4) and term.block == 2
    assert term.spec() == {"kind": "hadamard", "shape": [4, 4], "factors": [2], "transposed": False}


def test_signs_take_one_bit():
    assert Hadamard.random(11008).storage_bits == 11008
    assert Hadamard.random(13).storage_bits == 16  # whole bytes


@settings(max_examples=40)
@given(size=st.integers(1, 100), seed=st.integers(0, 999))
def test_hadamard_is_signs_then_blocks(size, seed):
    term = Hadamard.random(size, seed=seed)
    signs = 1 - 2.0 * np.unpackbits(term.signs.numpy(), count=size, bitorder="little")
    block = np.ones((1, 1))
    for factor in term.factors:
        block = np.kron(block, hadamard_matrix(factor).numpy())
    expected = np.kron(np.eye(size // term.block), block) @ np.diag(signs) / term.block**0.5
    assert np.allclose(dense64(term).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 13, 24, 86, 128, 172, 352])
def test_hadamard_is_orthogonal(size):
    term = Hadamard.random(size, seed=3)
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(dense64(term) @ dense64(term).T, eye, rtol=0, atol=1e-12)
    assert torch.allclose(dense64(Product((term.inverse(), term))), eye, rtol=0, atol=1e-12)
    x = torch.randn(7, size)
    assert torch.allclose(term.inverse().linear(term.linear(x)), x, rtol=0, atol=1e-6 * float(x.abs().max()))


def test_seeds_give_other_signs_and_the_same_ones_again():
    a, b, again = (Hadamard.random(256, seed=s).signs for s in (0, 1, 0))
    assert torch.equal(a, again) and not torch.equal(a, b)


@pytest.mark.parametrize("signs", [torch.zeros(1, dtype=torch.uint8), torch.zeros(2)])
def test_wrong_signs_are_refused(signs):
    with pytest.raises(ShapeError, match=r"Hadamard\(12\) got signs .*Build it with Hadamard.random"):
        Hadamard(signs, 12, (12,))


@pytest.mark.parametrize("factors", [(), (8,), (6,), (2, 3)])
def test_wrong_factors_are_refused(factors):
    with pytest.raises(ShapeError, match=r"Hadamard\(12\) got factors .*Take them from tnc.hadamard.block_factors"):
        Hadamard(torch.zeros(2, dtype=torch.uint8), 12, factors)


def test_permutation_by_hand():
    term = Permutation.of(torch.tensor([2, 0, 1]))
    assert term.linear(torch.tensor([10.0, 20.0, 30.0])).tolist() == [30, 10, 20]
    assert term.to_dense().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert term.inverse().indices.tolist() == [1, 2, 0]
    assert term.spec() == {"kind": "permutation", "shape": [3, 3]} and term.storage_bits == 3 * 8


@given(size=st.integers(1, 40), seed=st.integers(0, 999))
def test_permutation_and_inverse(size, seed):
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    term = Permutation.of(order)
    matrix = torch.randn(size, 3, dtype=torch.float64)
    assert torch.equal(Product((term, Dense(matrix))).to_dense(), matrix[order])
    assert torch.equal(Product((term.inverse(), term)).to_dense(), torch.eye(size))


@pytest.mark.parametrize(("size", "bits"), [(1, 8), (256, 8), (257, 16), (32768, 16), (32769, 32)])
def test_indices_take_the_narrowest_dtype(size, bits):
    term = Permutation.of(torch.arange(size).flip(0))
    assert term.storage_bits == size * bits
    assert torch.equal(term.inverse().indices, term.indices)


@pytest.mark.parametrize("indices", [[0, 0], [1, 2], [[0, 1]], [-1, 0]])
def test_no_permutation_is_refused(indices):
    with pytest.raises(ShapeError, match=r"Permutation.of got indices of shape .* each of 0 .. features - 1 once"):
        Permutation.of(torch.tensor(indices))


@pytest.mark.parametrize("indices", [torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64), torch.tensor([True])])
def test_indices_are_a_vector_of_integers(indices):
    with pytest.raises(ShapeError, match=r"Permutation got indices .* Build it with Permutation.of"):
        Permutation(indices)
