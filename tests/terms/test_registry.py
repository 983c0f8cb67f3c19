"""The registry, the round trip through a file's contents, and the casts of whole expressions."""

import json

import pytest
import torch
from hypothesis import given, settings

from tnc.errors import TNCError
from tnc.formats import IntFormat
from tnc.terms import Dense, LowRank, Quantized, Sum, base, cast, dense64, from_spec, kinds, map_tensors, register
from tnc.testing import expressions


def test_kinds_are_sorted_and_known():
    assert list(kinds()) == sorted(kinds())
    assert {"dense", "diagonal", "low_rank", "product", "quantized", "sum"} <= set(kinds())


def test_a_kind_is_taken_once():
    class Second(Dense):
        kind = "dense"

    with pytest.raises(TNCError, match=r"term kind 'dense' is already registered by Dense; choose another"):
        register(Second)
    assert base._KINDS["dense"] is Dense


def test_a_new_kind_joins_and_nests(monkeypatch):
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))

    @register
    class Mine(Dense):
        kind = "mine"

    term = Sum((Mine(torch.ones(2, 2)), Dense(torch.ones(2, 2))))
    assert type(from_spec(term.spec(), term.tensors()).terms[0]) is Mine


@pytest.mark.parametrize("spec", ({"kind": "nothing"}, {}))
def test_an_unknown_kind_lists_the_known_ones(spec):
    with pytest.raises(
        TNCError, match=r"unknown term kind .*; this version of tnc knows .*dense, .*Upgrade tnc"
    ) as caught:
        from_spec(spec, {})
    assert all(kind in str(caught.value) for kind in kinds())


@settings(max_examples=40, deadline=None)
@given(term=expressions())
def test_spec_and_tensors_rebuild_bit_for_bit(term):
    again = from_spec(json.loads(json.dumps(term.spec())), term.tensors())
    assert torch.equal(again.to_dense(), term.to_dense())
    assert again.spec() == term.spec() and again.storage_bits == term.storage_bits


@settings(max_examples=40, deadline=None)
@given(term=expressions())
def test_dense64_is_the_stored_matrix_in_float64(term):
    assert dense64(term).dtype == torch.float64
    size = max(1.0, float(dense64(term).abs().max()))
    wide = float((dense64(term) - term.to_dense().double()).abs().max())
    assert wide <= 1e-3 * size  # to_dense rounds inner products to float32
    assert torch.equal(dense64(cast(term, torch.float64)), dense64(term))


def test_cast_leaves_codes_alone():
    codes = torch.tensor([[0, 1, 2, 3]])
    term = Quantized.from_codes(codes, torch.ones(1, 1).half(), torch.tensor([[1]]), IntFormat(2))
    mixed = cast(Sum((term, LowRank(torch.ones(1, 1), torch.ones(1, 4)))), torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in mixed.tensors().items()}
    assert dtypes == {
        "0.codes": torch.uint8,
        "0.scale": torch.bfloat16,
        "0.zero": torch.uint8,
        "1.left": torch.bfloat16,
        "1.right": torch.bfloat16,
    }
    assert mixed.to_dense().tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_cast_rounds_and_dense64_keeps_what_is_stored():
    third = Dense(torch.tensor([[1 / 3]], dtype=torch.float64))
    narrow = cast(third, torch.bfloat16)
    assert float(dense64(third)) == 1 / 3
    assert float(dense64(narrow)) == float(torch.tensor(1 / 3, dtype=torch.float64).bfloat16())


def test_map_tensors_does_not_touch_the_original():
    term = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    doubled = map_tensors(term, lambda t: 2 * t)
    assert torch.equal(doubled.to_dense(), torch.full((2, 3), 4.0))
    assert torch.equal(term.to_dense(), torch.ones(2, 3))


def test_a_product_of_many_dtypes_is_as_wide_as_the_widest():
    term = Sum((Dense(torch.ones(1, 1).half()), Dense(torch.ones(1, 1, dtype=torch.float64))))
    assert term.to_dense().dtype == torch.float64
