"""Sums, products, canonical forms, rounding and exchange, each against dense linear algebra."""

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.tt_matrix import TTMatrix

from tnc.errors import BudgetError, LawError, ShapeError
from tnc.networks import (
    add,
    balanced_modes,
    compose,
    from_quimb_arrays,
    from_tensorly,
    inner,
    left_canonical,
    mixed_canonical,
    norm,
    right_canonical,
    round_mpo,
    scale,
    to_quimb_arrays,
    to_tensorly,
    transpose,
    tt_svd,
)  # fmt: skip
from tnc.networks.algebra import without_padding
from tnc.terms import Mpo
from tnc.testing import check_mpo_gauge, check_mpo_product, check_mpo_sum, mpos

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@st.composite
def pairs(draw):
    """Two operators of one shape and modes."""
    a = draw(mpos())
    return a, draw(mpos(a.shape, (a.out_modes, a.in_modes)))


def test_every_law_of_sums_products_and_gauges():
    assert check_mpo_sum(add) == ("the_sum_is_dense", "bonds_add_up")
    assert check_mpo_product(compose) == ("the_product_is_dense",)
    assert check_mpo_gauge(mixed_canonical) == ("no_bond_grows", "the_matrix_stays", "cores_are_orthonormal")


@pytest.mark.parametrize(
    ("law", "check", "broken"),
    [
        ("the_sum_is_dense", check_mpo_sum, lambda a, b: add(a, scale(b, -1.0))),
        ("bonds_add_up", check_mpo_sum, lambda a, b: add(add(a, b), scale(b, 0.0))),
        ("the_product_is_dense", check_mpo_product, lambda a, b: compose(a, scale(b, 1.001))),
        ("cores_are_orthonormal", check_mpo_gauge, lambda a, center: mixed_canonical(a, 0)),
        ("cores_are_orthonormal", check_mpo_gauge, lambda a, center: a),
        ("the_matrix_stays", check_mpo_gauge, lambda a, center: mixed_canonical(scale(a, -1.0), center)),
        ("no_bond_grows", check_mpo_gauge, lambda a, center: add(a, scale(a, 0.0))),
    ],
)
def test_broken_arithmetic_is_seen(law, check, broken):
    with pytest.raises(LawError, match=law):
        check(broken, max_examples=30)


@given(pair=pairs(), factor=st.sampled_from((0.0, -1.0, 2.5)))
def test_sum_and_scale_agree_with_dense(pair, factor):
    a, b = pair
    torch.testing.assert_close(add(a, scale(b, factor)).to_dense(), a.to_dense() + factor * b.to_dense(), **CLOSE)


@given(a=mpos())
def test_transpose_agrees_with_dense(a):
    torch.testing.assert_close(transpose(a).to_dense(), a.to_dense().T)
    assert transpose(transpose(a)).spec() == a.spec()


@given(pair=pairs())
def test_norm_and_inner_product_leave_the_padding_out(pair):
    a, b = pair
    x, y = a.to_dense(), b.to_dense()
    assert norm(a) == pytest.approx(float(x.norm()), rel=1e-10)
    assert inner(a, b) == pytest.approx(float((x * y).sum()), rel=1e-9, abs=1e-9 * float(x.norm() * y.norm()))


@given(a=mpos())
def test_padding_can_be_taken_out(a):
    clean = without_padding(a)
    torch.testing.assert_close(clean.to_dense(), a.to_dense(), **CLOSE)
    whole = Mpo(clean.cores).to_dense()
    assert not whole[a.shape[0] :].any()
    assert not whole[:, a.shape[1] :].any()


@given(a=mpos(), data=st.data())
def test_the_center_holds_the_norm(a, data):
    center = data.draw(st.integers(0, len(a.cores) - 1))
    form = mixed_canonical(a, center)
    assert float(form.cores[center].norm()) == pytest.approx(float(Mpo(a.cores).to_dense().norm()), rel=1e-10)
    assert left_canonical(a).spec() == mixed_canonical(a, len(a.cores) - 1).spec()
    assert right_canonical(a).spec() == mixed_canonical(a, 0).spec()


@given(a=mpos(), eps=st.sampled_from((0.5, 0.1, 1e-3, 1e-10)))
def test_rounding_keeps_its_tolerance_and_is_idempotent(a, eps):
    once = round_mpo(a, eps=eps)
    assert float((once.to_dense() - a.to_dense()).norm()) <= eps * float(a.to_dense().norm()) * (1 + 1e-9)
    assert all(r <= s for r, s in zip(once.ranks, without_padding(a).ranks, strict=True))
    again = round_mpo(once, max_rank=list(once.ranks[1:-1]))
    if not a.padded:
        torch.testing.assert_close(again.to_dense(), once.to_dense(), **CLOSE)


@given(pair=pairs())
def test_rounding_undoes_a_sum_with_itself(pair):
    a, _ = pair
    if a.padded:
        return
    double = round_mpo(add(a, a), eps=1e-9)
    assert all(r <= s for r, s in zip(double.ranks, a.ranks, strict=True))
    torch.testing.assert_close(double.to_dense(), 2 * a.to_dense(), rtol=1e-7, atol=1e-7)


@given(a=mpos(most=6), rank=st.integers(1, 4))
def test_rounding_by_rank_is_as_good_as_tt_svd_bounds(a, rank):
    if a.padded:
        return
    dense = a.to_dense()
    rounded = float((round_mpo(a, max_rank=rank).to_dense() - dense).norm())
    best = float((tt_svd(dense, a.out_modes, a.in_modes, max_rank=rank).to_dense() - dense).norm())
    assert rounded == pytest.approx(best, rel=1e-6, abs=1e-8 * float(dense.norm()))


@given(a=mpos())
def test_exchange_with_tensorly_keeps_the_matrix(a):
    theirs = TTMatrix([core.numpy() for core in to_tensorly(a)])
    matrix = torch.from_numpy(tensorly.tt_matrix_to_matrix(theirs))
    torch.testing.assert_close(matrix[: a.shape[0], : a.shape[1]], a.to_dense())
    back = from_tensorly(theirs, features=a.shape)
    assert back.spec() == a.spec()
    assert all(torch.equal(x, y) for x, y in zip(back.cores, a.cores, strict=True))


@given(a=mpos(), order=st.permutations("lrud").map("".join))
def test_exchange_with_quimb_arrays(a, order):
    arrays = to_quimb_arrays(a, shape=order)
    back = from_quimb_arrays([array.numpy() for array in arrays], shape=order, features=a.shape)
    assert back.spec() == a.spec()
    assert all(torch.equal(x, y) for x, y in zip(back.cores, a.cores, strict=True))
    if len(arrays) > 1:  # contract the middle and the ends by the legs' names alone
        legs = [leg for leg in order if leg != "l"]
        assert arrays[0].shape[legs.index("u")] == a.out_modes[0]
        assert arrays[0].shape[legs.index("r")] == a.ranks[1]


@pytest.mark.parametrize("modes", [(2, 7), (4, 4), (2, 2, 4)])
def test_a_prime_size_keeps_its_padding_in_the_storage(modes):
    weight = torch.randn(13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = tt_svd(weight, modes, modes)
    torch.testing.assert_close(found.to_dense(), weight)
    assert found.padded
    assert found.storage_bits == 64 * found.params


def test_what_does_not_fit_is_named():
    a, b = tt_svd(torch.eye(6), (2, 3), (2, 3)), tt_svd(torch.eye(6), (3, 2), (3, 2))
    for wrong in (lambda: add(a, b), lambda: inner(a, b), lambda: compose(a, b)):
        with pytest.raises(ShapeError, match="modes"):
            wrong()
    with pytest.raises(ShapeError, match="center"):
        mixed_canonical(a, 2)
    with pytest.raises(BudgetError, match="max_rank"):
        round_mpo(a)
    with pytest.raises(ShapeError, match="lrud"):
        to_quimb_arrays(a, shape="lrux")
    with pytest.raises(ShapeError, match="legs"):
        from_quimb_arrays([torch.ones(2, 2), torch.ones(2, 2, 2)])
    with pytest.raises(ShapeError, match="r_prev"):
        Mpo((torch.ones(1, 2, 2, 3), torch.ones(2, 2, 2, 1)))
    with pytest.raises(ShapeError, match="features"):
        Mpo((torch.ones(1, 2, 2, 1),), (3, 2))
    with pytest.raises(ShapeError, match="at least 1"):
        balanced_modes(0, 2)
