"""Leaf terms against their definitions, small enough to check by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import ShapeError
from tnc.terms import Dense, Diagonal, LowRank, Sparse
from tnc.testing import expressions, weights


def test_dense_by_hand():
    term = Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert term.shape == (3, 2)
    assert term.linear(torch.tensor([1.0, 10.0])).tolist() == [21.0, 43.0, 65.0]
    assert term.storage_bits == 6 * 32
    assert term.spec() == {"kind": "dense", "shape": [3, 2]}


def test_low_rank_by_hand():
    term = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0, 4.0]]))
    assert term.shape == (2, 3) and term.rank == 1
    assert term.to_dense().tolist() == [[3.0, 0.0, 4.0], [6.0, 0.0, 8.0]]
    assert term.linear(torch.tensor([1.0, 5.0, -1.0])).tolist() == [-1.0, -2.0]
    assert term.storage_bits == 5 * 32
    assert term.spec() == {"kind": "low_rank", "shape": [2, 3], "rank": 1}


def test_rank_zero_is_the_zero_matrix():
    term = LowRank(torch.zeros(2, 0), torch.zeros(0, 3))
    assert term.shape == (2, 3) and term.rank == 0 and term.storage_bits == 0
    assert torch.equal(term.to_dense(), torch.zeros(2, 3))
    assert torch.equal(term.linear(torch.ones(4, 3)), torch.zeros(4, 2))


def test_diagonal_by_hand():
    term = Diagonal(torch.tensor([2.0, -1.0], dtype=torch.float16))
    assert term.shape == (2, 2)
    assert term.to_dense().tolist() == [[2.0, 0.0], [0.0, -1.0]]
    assert term.linear(torch.tensor([[3.0, 4.0]])).tolist() == [[6.0, -4.0]]
    assert term.storage_bits == 2 * 16


@settings(max_examples=30, deadline=None)
@given(left=weights(), columns=st.integers(1, 6))
def test_low_rank_is_its_sum_of_outer_products(left, columns):
    right = torch.randn(left.shape[1], columns, generator=torch.Generator().manual_seed(0)).to(left.dtype)
    term = LowRank(left, right)
    expected = torch.zeros(left.shape[0], columns, dtype=torch.float64)
    for k in range(left.shape[1]):
        expected += torch.outer(left[:, k].double(), right[k].double())
    bound = 1e-6 * (left.double().abs() @ right.double().abs())
    assert bool(((term.to_dense().double() - expected).abs() <= bound).all())


@settings(max_examples=30, deadline=None)
@given(term=expressions())
def test_to_dense_is_never_narrower_than_float32(term):
    tensors = term.tensors()
    stored = [t.dtype for t in tensors.values() if t.is_floating_point()]
    prefixes = [name.removesuffix("codes") for name in tensors if name.endswith("codes")]
    only_bytes = any(not tensors[p + "scale"].is_floating_point() and p + "outer" not in tensors for p in prefixes)
    exact = "hadamard" in str(term.spec())  # stores no floating tensor that could set a dtype
    expected = torch.float64 if torch.float64 in stored or only_bytes or exact else torch.float32
    assert term.to_dense().dtype == expected


@pytest.mark.parametrize("shape", ((3,), (2, 3, 4), ()))
def test_dense_needs_a_matrix(shape):
    with pytest.raises(ShapeError, match=r"Dense got shape .*; expected a matrix \(out_features, in_features\)"):
        Dense(torch.zeros(shape))


@pytest.mark.parametrize("shape", ((3, 3), ()))
def test_diagonal_needs_a_vector(shape):
    with pytest.raises(ShapeError, match=r"Diagonal got shape .*; expected a vector \(features,\)"):
        Diagonal(torch.zeros(shape))


@pytest.mark.parametrize(("left", "right"), (((3, 2), (3, 4)), ((3,), (1, 4)), ((3, 2), (2,))))
def test_low_rank_needs_one_rank(left, right):
    with pytest.raises(ShapeError, match=r"LowRank got left .* and right .*; expected .* with one rank"):
        LowRank(torch.zeros(left), torch.zeros(right))


def test_sparse_by_hand():
    term = Sparse.of(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float16))
    assert (term.shape, term.density) == ((2, 3), 2 / 6)
    assert term.values.tolist() == [2.0, 3.0]
    assert term.mask.tolist() == [[0b010], [0b001]]
    assert term.linear(torch.tensor([1.0, 10.0, 100.0])).tolist() == [20.0, 3.0]
    assert term.storage_bits == 2 * 16 + 2 * 8
    assert term.spec() == {"kind": "sparse", "shape": [2, 3]}


@settings(max_examples=30, deadline=None)
@given(matrix=weights(), seed=st.integers(0, 9))
def test_sparse_is_exact(matrix, seed):
    kept = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    term = Sparse.of(matrix * kept)
    assert torch.equal(term.to_dense(), (matrix * kept).to(term.to_dense().dtype))
    assert torch.equal(term.places(), (matrix * kept) != 0)
    coo = (matrix * kept).double().to_sparse()
    assert term.values.double().tolist() == coo.coalesce().values().tolist()


def test_two_of_four_takes_nine_bits_a_weight():
    matrix = torch.tensor([[1.0, 0.0, 0.0, 2.0] * 4]).to(torch.bfloat16)
    assert Sparse.of(matrix).storage_bits == 16 * (8 + 1)


def test_sparse_needs_a_matrix_and_a_mask_that_fits():
    with pytest.raises(ShapeError, match=r"Sparse.of got a torch.int64 tensor .*floating-point matrix"):
        Sparse.of(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"mask \(2, 3\); expected a vector and a mask \(2, 1\) for in_features=3"):
        Sparse(torch.ones(2), torch.zeros(2, 3, dtype=torch.uint8), 3)
