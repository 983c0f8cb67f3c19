"""`Sum` and `Product`: flat, n-ary, and equal to adding and multiplying the matrices."""

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import ShapeError
from tnc.terms import Dense, Diagonal, LowRank, Product, Sum, dense64
from tnc.terms.combine import child_tensors
from tnc.testing import expressions


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, C = Dense(matrix(2, 3, 1)), Dense(matrix(2, 3, 2)), Dense(matrix(2, 3, 3))
P, Q = Dense(matrix(3, 4, 4)), Dense(matrix(4, 2, 5))


def test_sum_by_hand():
    total = Sum((Dense(torch.tensor([[1.0, 2.0]])), Dense(torch.tensor([[10.0, 20.0]]))))
    assert total.shape == (1, 2)
    assert total.to_dense().tolist() == [[11.0, 22.0]]
    assert total.linear(torch.tensor([1.0, 1.0])).tolist() == [33.0]


def test_product_by_hand():
    scaled = Product((Dense(torch.tensor([[1.0, 2.0]])), Diagonal(torch.tensor([3.0, 5.0]))))
    assert scaled.shape == (1, 2)
    assert scaled.to_dense().tolist() == [[3.0, 10.0]]
    assert scaled.linear(torch.tensor([1.0, 1.0])).tolist() == [13.0]


def test_nested_sums_and_products_are_flat():
    assert Sum((Sum((A, B)), C)).terms == (A, B, C) == Sum((A, Sum((B, Sum((C,)))))).terms
    assert Product((A, Product((P, Q)))).terms == (A, P, Q) == Product((Product((A, P)), Q)).terms


def test_a_sum_in_a_product_stays():
    inner = Sum((A, B))
    assert Product((inner, P)).terms == (inner, P)
    assert Sum((Product((A, P)), Product((B, P)))).shape == (2, 4)


def test_tensors_and_specs_are_named_by_index():
    term = Sum((A, LowRank(torch.zeros(2, 1), torch.zeros(1, 3))))
    assert list(term.tensors()) == ["0.matrix", "1.left", "1.right"]
    spec = term.spec()
    assert (spec["kind"], spec["shape"]) == ("sum", [2, 3])
    assert [s["kind"] for s in spec["terms"]] == ["dense", "low_rank"]
    assert term.storage_bits == 64 * 6 + 32 * 5


def test_child_tensors_do_not_mix_indices_above_nine():
    tensors = {f"{i}.matrix": torch.tensor(float(i)) for i in range(12)}
    assert {k: float(t) for k, t in child_tensors(1, tensors).items()} == {"matrix": 1.0}
    many = Sum(tuple(Dense(torch.full((1, 1), float(i))) for i in range(12)))
    again = Sum.from_parts(many.spec(), many.tensors())
    assert [float(t.matrix) for t in again.terms] == [float(i) for i in range(12)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_sum_is_the_sum_and_product_the_product(data):
    same = data.draw(st.lists(expressions((3, 5)), min_size=1, max_size=3))
    chain = [data.draw(expressions(shape)) for shape in ((3, 5), (5, 5), (5, 2))]
    total = sum(dense64(t) for t in same)
    product = reduce(torch.matmul, [dense64(t) for t in chain])
    torch.testing.assert_close(dense64(Sum(tuple(same))), total)
    torch.testing.assert_close(dense64(Product(tuple(chain))), product)


def test_one_term_is_itself():
    assert torch.equal(Sum((A,)).to_dense(), A.to_dense()) and torch.equal(Product((A,)).to_dense(), A.to_dense())


@pytest.mark.parametrize("combinator", (Sum, Product))
def test_no_terms_are_refused(combinator):
    with pytest.raises(ShapeError, match=rf"{combinator.__name__} of no terms has no shape; pass at least one term"):
        combinator(())


def test_a_sum_of_two_shapes_is_refused():
    with pytest.raises(ShapeError, match=r"Sum got shapes \[\(2, 3\), \(3, 4\)\]; expected one shape for all terms"):
        Sum((A, P))


def test_a_product_without_matching_sizes_is_refused():
    with pytest.raises(ShapeError, match=r"Product got shapes \[\(2, 3\), \(4, 2\)\]; expected each in_features"):
        Product((A, Q))
