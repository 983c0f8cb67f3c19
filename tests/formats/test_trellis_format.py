"""`TrellisFormat`: states, rings and computed codes against plain loops; and what it refuses."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import FormatError
from tnc.formats import CODES, TrellisFormat, format_from_spec, number_format


def test_computed_codes_by_plain_integers():
    for state in (0, 1, 77, 4095, 65535):
        word = (34038481 * state + 76625530) % 2**32
        mad = (sum(word.to_bytes(4, "little")) - 510) / 147.800537109375
        word = (89226354 * state + 64248484) % 2**32
        half = struct.unpack("<H", struct.pack("<e", 0.922))[0]
        parts = [(word >> shift & 0xFFFF & 0x8FFF) ^ half for shift in (0, 16)]
        inst = sum(struct.unpack("<e", struct.pack("<H", part))[0] for part in parts) / 1.236
        for code, expected in (("1mad", mad), ("3inst", inst)):
            assert float(CODES[code](torch.tensor([state]))) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("code", CODES)
def test_computed_codes_are_near_gaussian(code):
    levels = CODES[code](torch.arange(1 << 16)).double()
    assert abs(float(levels.mean())) < 0.01
    assert float(levels.square().mean()) == pytest.approx(1, abs=0.02)
    assert float(levels.square().square().mean()) == pytest.approx(3, abs=0.4)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.sampled_from(((2, 12), (2, 16), (3, 12), (3, 15), (4, 16))), st.integers(1, 17),
       st.integers(0, 99))  # fmt: skip
def test_states_are_the_last_bits_of_the_ring(rows, sizes, length, seed):
    bits, state_bits = sizes
    format = TrellisFormat(bits, state_bits, length=length)
    codes = torch.randint(1 << bits, (rows, 2), generator=torch.Generator().manual_seed(seed))
    states = format.states(codes)
    pieces = format.sequences(rows)
    assert [first for first, _ in pieces] == [0, *(last for _, last in pieces[:-1])] and pieces[-1][1] == rows
    lengths = [last - first for first, last in pieces]
    assert max(lengths) <= length and max(lengths) - min(lengths) <= 1
    for first, last in pieces:
        ring = codes[first:last, 0].tolist()
        for t in range(last - first):
            expected = sum(ring[(t - i) % len(ring)] << bits * i for i in range(state_bits // bits))
            assert int(states[first + t, 0]) == expected
    assert torch.equal(format.states(codes[:, :1]), states[:, :1])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 11), st.integers(1, 11), st.sampled_from((1, 2, 5, 99)), st.integers(0, 99))
def test_states_on_anti_diagonals(rows, columns, length, seed):
    """Down and to the left, cut and closed as columns are; groups of columns are decoded as the whole matrix is."""
    format = TrellisFormat(2, 8, length=length, path="diagonal")
    codes = torch.randint(4, (rows, columns), generator=torch.Generator().manual_seed(seed))
    states = format.states(codes)
    seen = 0
    for line in range(rows + columns - 1):
        entries = [(i, line - i) for i in range(rows) if 0 <= line - i < columns]
        for first, last in format.sequences(len(entries)):
            ring = entries[first:last]
            for t, entry in enumerate(ring):
                before = (int(codes[ring[(t - i) % len(ring)]]) << 2 * i for i in range(4))
                assert int(states[entry]) == sum(before)
                seen += 1
    assert seen == rows * columns
    assert torch.equal(format.states(codes.reshape(rows, columns, 1)).reshape(rows, columns), states)


def test_a_trellis_stores_its_bits_and_survives_json():
    format = number_format("trellis2", group_size=64)
    assert format == TrellisFormat(2, group_size=64) and format.describe() == "trellis2 L12 g64"
    assert format.stored_bits((256, 512)) == (2 + 16 / 64) * 256 * 512
    assert format_from_spec(json.loads(json.dumps(format.spec()))) == format
    assert not format.has_exact_zero and format.columns_alone and "path" not in format.spec()
    diagonal = number_format("trellis2_diagonal")
    assert format_from_spec(json.loads(json.dumps(diagonal.spec()))) == diagonal and not diagonal.columns_alone
    assert diagonal.describe() == "trellis2 L12 diagonal"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrellisFormat(5), r"TrellisFormat\(bits=5, state_bits=12\) is not supported; expected 2, 3 or 4 bits"),
        (lambda: TrellisFormat(3, 16), r"a multiple of them up to 16"),
        (lambda: TrellisFormat(2, 18), r"a multiple of them up to 16"),
        (lambda: TrellisFormat(2, code="x"), r"code='x'\) is unknown; expected one of 1mad, 3inst"),
        (
            lambda: TrellisFormat(2, path="row"),
            r"path='row', pad=False\) is not supported; expected column or diagonal",
        ),
        (lambda: TrellisFormat(2, path="diagonal", pad=True), r"the second without padding"),
        (lambda: TrellisFormat(2, length=0), r"length=0\) must be at least 1 row"),
        (lambda: TrellisFormat(2, group_size=0), r"group_size=0\) must be at least 1"),
    ],
)
def test_messages(call, message):
    with pytest.raises(FormatError, match=message):
        call()
