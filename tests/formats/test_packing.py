"""Packing: an exact inverse, and the documented layout against numpy's own bit packing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import FormatError
from tnc.formats import pack, packed_length, unpack

BITS = st.integers(1, 8)


def codes_of(shape, bits, seed, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator).to(dtype)


def packed_by_numpy(codes, bits):
    """Each code's bits, least significant first, in one stream; numpy cuts the stream into bytes."""
    stream = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8)
    return np.packbits(stream, axis=-1, bitorder="little")


@settings(max_examples=80, deadline=None)
@given(
    bits=BITS,
    batch=st.sampled_from(((), (1,), (3,), (2, 2), (0,))),
    count=st.integers(0, 70),
    seed=st.integers(0, 255),
    dtype=st.sampled_from((torch.int64, torch.int32, torch.uint8)),
)
def test_unpack_inverts_pack_and_numpy_agrees(bits, batch, count, seed, dtype):
    codes = codes_of((*batch, count), bits, seed, dtype)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*batch, packed_length(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes.to(torch.uint8))
    np.testing.assert_array_equal(packed.numpy(), packed_by_numpy(codes.long(), bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_count_up_to_two_words_and_every_code(bits):
    for count in range(18):
        ramp = torch.arange(count) % 2**bits
        assert torch.equal(unpack(pack(ramp, bits), bits, count).long(), ramp)
    every = torch.arange(2**bits)
    assert torch.equal(unpack(pack(every, bits), bits, len(every)).long(), every)


def test_layout_by_hand():
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00_11_10_01]
    assert pack(torch.tensor([5, 10]), 4).tolist() == [0xA5]
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]  # code 3 is 0b011, cut at the byte
    assert pack(torch.tensor([7]), 3).tolist() == [7]
    assert pack(torch.tensor([255, 0, 128]), 8).tolist() == [255, 0, 128]


@pytest.mark.parametrize(
    ("count", "bits", "length"), [(0, 3, 0), (1, 1, 1), (8, 3, 3), (9, 3, 4), (5, 2, 2), (3, 8, 3)]
)
def test_packed_length_by_hand(count, bits, length):
    assert packed_length(count, bits) == length


def test_rows_do_not_share_bytes():
    codes = codes_of((4, 5), 3, 0)
    rows = torch.stack([pack(row, 3) for row in codes])
    assert torch.equal(pack(codes, 3), rows)


def test_inputs_are_unchanged():
    codes = codes_of((2, 9), 4, 1)
    before = codes.clone()
    packed = pack(codes, 4)
    held = packed.clone()
    unpack(packed, 4, 9)
    assert torch.equal(codes, before) and torch.equal(packed, held)


@pytest.mark.parametrize(("codes", "bits"), [([0, 4], 2), ([-1, 0], 3), ([256], 8), ([2], 1)])
def test_codes_out_of_range_are_refused(codes, bits):
    message = rf"pack\(bits={bits}\) got codes in \[{min(codes)}, {max(codes)}\]; expected 0 <= code < {2**bits}"
    with pytest.raises(FormatError, match=message):
        pack(torch.tensor(codes), bits)


@pytest.mark.parametrize("bits", (0, 9, -1))
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(FormatError, match=rf"bits={bits} cannot be packed; expected 1 to 8 bits"):
        pack(torch.tensor([0]), bits)
    with pytest.raises(FormatError, match=rf"bits={bits} cannot be packed; expected 1 to 8 bits"):
        unpack(torch.tensor([0], dtype=torch.uint8), bits, 1)
