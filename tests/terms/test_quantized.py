"""`Quantized` against a plain loop over groups, and its stored bits."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import FormatError, ShapeError
from tnc.formats import IntFormat, packed_length
from tnc.terms import Quantized
from tnc.testing import int_formats


def example(rows, columns, format, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    groups = columns // format.group_of(columns)
    codes = torch.randint(format.levels, (rows, columns), generator=generator)
    zero = torch.randint(format.levels, (rows, groups), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(dtype)
    return codes, scale, zero, Quantized.from_codes(codes, scale, zero, format)


def by_loop(codes, scale, zero, format):
    group = format.group_of(codes.shape[1])
    dense = torch.empty(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            shift = format.levels // 2 if format.symmetric else int(zero[i, j // group])
            dense[i, j] = float(scale[i, j // group]) * (int(codes[i, j]) - shift)
    return dense


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    rows=st.sampled_from((1, 2, 3, 7)),
    columns=st.sampled_from((1, 2, 5, 8, 12, 13)),
    seed=st.integers(0, 255),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
)
def test_dequantizes_as_a_plain_loop(data, rows, columns, seed, dtype):
    format = data.draw(int_formats(columns))
    codes, scale, zero, term = example(rows, columns, format, seed, dtype)
    assert torch.equal(term.integer_codes().long(), codes)
    tolerance = 0 if dtype in (torch.float16, torch.bfloat16) else 1e-6  # 11 + 8 bits fit a float32
    expected = by_loop(codes, scale, zero, format)
    torch.testing.assert_close(term.to_dense().double(), expected, rtol=tolerance, atol=0)


def test_by_hand():
    format = IntFormat(2, group_size=2)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    term = Quantized.from_codes(torch.tensor([[0, 3, 1, 2]]), scale, torch.tensor([[1, 3]]), format)
    assert term.to_dense().tolist() == [[-0.5, 1.0, -4.0, -2.0]]
    assert term.linear(torch.tensor([2.0, 1.0, 1.0, 0.0])).tolist() == [-4.0]
    assert term.zeros().tolist() == [[1.0, 3.0]]
    assert term.storage_bits == 8 + 2 * 16 + 8  # one byte of codes, two scales, one byte of zeros


def test_symmetric_zero_is_mid_range_and_not_stored():
    format = IntFormat(3, symmetric=True)
    term = Quantized.from_codes(torch.tensor([[0, 4, 7]]), torch.ones(1, 1).half(), torch.tensor([[6]]), format)
    assert term.zero is None and "zero" not in term.tensors()
    assert term.to_dense().tolist() == [[-4.0, 0.0, 3.0]]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 24))
def test_stored_bits_are_what_the_format_says(data, rows, columns):
    format = data.draw(int_formats(columns))
    term = example(rows, columns, format)[-1]
    groups = columns // format.group_of(columns)
    zeros = 0 if format.symmetric else packed_length(groups, format.bits)
    assert term.storage_bits == 8 * rows * (packed_length(columns, format.bits) + 2 * groups + zeros)


def test_bits_per_weight_of_whole_bytes():
    term = example(2, 128 * 8, IntFormat(3, group_size=128))[-1]
    assert term.storage_bits / (2 * 1024) == 3 + (16 + 3) / 128


def test_linear_rounds_the_weight_once():
    codes, scale, zero, term = example(3, 8, IntFormat(8, group_size=4))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = by_loop(codes, scale, zero, term.format).float().bfloat16()
    assert torch.equal(term.linear(x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    ("field", "tensor"),
    [
        ("codes", torch.zeros(2, 5, dtype=torch.uint8)),
        ("scale", torch.zeros(2, 3)),
        ("zero", torch.zeros(2, 2, dtype=torch.uint8)),
        ("zero", None),
    ],
)
def test_stored_shapes_are_checked(field, tensor):
    term = example(2, 8, IntFormat(4, group_size=4))[-1]
    given = None if tensor is None else tuple(tensor.shape)
    with pytest.raises(ShapeError) as caught:
        dataclasses.replace(term, **{field: tensor})
    expected = {"codes": (2, 4), "scale": (2, 2), "zero": (2, 1)}[field]
    assert f"Quantized {field} has shape {given}; expected {expected} for a weight (2, 8)" in str(caught.value)


def test_a_zero_beside_a_symmetric_format_is_refused():
    term = example(2, 8, IntFormat(4, group_size=4, symmetric=True))[-1]
    with pytest.raises(ShapeError, match=r"Quantized zero has shape \(2, 1\); expected None"):
        dataclasses.replace(term, zero=torch.zeros(2, 1, dtype=torch.uint8))


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(FormatError, match=r"pack\(bits=2\) got codes in \[0, 4\]"):
        Quantized.from_codes(torch.tensor([[0, 4]]), torch.ones(1, 1), torch.zeros(1, 1).long(), IntFormat(2))
    with pytest.raises(FormatError, match=r"pack\(bits=2\) got codes in \[9, 9\]"):
        Quantized.from_codes(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.tensor([[9]]), IntFormat(2))


def test_spec_holds_the_format():
    term = example(2, 8, IntFormat(4, group_size=4))[-1]
    assert term.spec() == {
        "kind": "quantized",
        "shape": [2, 8],
        "format": {"type": "int", "bits": 4, "group_size": 4, "symmetric": False},
    }
