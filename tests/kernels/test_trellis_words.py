"""Trellis codes in words: states by the definition, read out of the words as kernels do, and codes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnc.formats import TrellisFormat
from tnc.kernels.trellis_words import BIAS, PLANES, TrellisWords, refusal

FORMATS = ((2, 12), (2, 16), (2, 4), (3, 12), (3, 15), (4, 12), (4, 8))


@st.composite
def weights(draw):
    bits, state_bits = draw(st.sampled_from(FORMATS))
    path, length = draw(st.sampled_from(("diagonal", "column"))), draw(st.sampled_from((80, 93, 256)))
    format = TrellisFormat(bits, state_bits, path=path, length=length)
    words = TrellisWords(format, draw(st.integers(1, 200)), draw(st.integers(1, 60)), draw(st.sampled_from((8, 16))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return words, torch.randint(0, 1 << bits, (words.rows, words.columns), generator=generator).to(torch.uint8)


def states_of(words, stream, marks, seams):
    """(rows, columns): the window of bits of every entry, the seams in their places."""
    format, mask = words.format, (1 << words.format.state_bits) - 1
    wide = stream.long() & 0xFFFFFFFF
    last = torch.zeros(words.units, words.lines, dtype=torch.int64)  # the word before a unit's first
    shift = words.skew * words.unit
    last[1:, : words.lines - shift] = wide[:-1, -1, shift:]
    planes = torch.cat([last.unsqueeze(1), wide], 1)
    where = torch.arange(words.lines) // words.block
    place = marks[:, where].long()
    seam = torch.where(place < 0, 255 << 16, seams[place.clamp_min(0), torch.arange(words.lines) % words.block].long())
    found = torch.empty(words.units * words.unit, words.columns, dtype=torch.int64)
    for r in range(words.unit):
        end = format.bits * (r + 1)
        plane = (end - 1) // 32
        state = (planes[:, plane] << 32 | planes[:, plane + 1]) >> (32 * (plane + 1) - end) & mask
        own = (r + 1 + BIAS - (seam >> 16)) * format.bits
        inside = (own > 0) & (own <= format.state_bits)
        own = torch.where(inside, own, 0)
        seamed = ((seam & 0xFFFF) << own | state & ((1 << own) - 1)) & mask
        state = torch.where(inside, seamed, state)
        found[r :: words.unit] = state[:, words.skew * r : words.skew * r + words.columns]
    return found[: words.rows]


@given(weight=weights())
def test_states_are_windows_and_codes_come_back(weight):
    words, codes = weight
    stream = words.words(codes)
    assert stream.shape == (words.units, PLANES[words.format.bits], words.lines) and stream.dtype == torch.int32
    assert torch.equal(words.codes(stream), codes)
    marks, seams = words.seams(codes)
    assert marks.shape == (words.units, words.lines // words.block) and seams.shape[1] == words.block
    assert torch.equal(states_of(words, stream, marks, seams), words.format.states(codes))


def test_seams_are_few():
    words = TrellisWords(TrellisFormat(2, path="diagonal"), 1024, 1024, 16)
    codes = torch.randint(0, 4, (1024, 1024), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    marks, seams = words.seams(codes)
    assert float((marks >= 0).float().mean()) < 0.15 and seams.numel() * 32 < 0.3 * codes.numel()


@pytest.mark.parametrize(("length", "served"), [(256, True), (41, True), (40, False), (16, False)])
def test_short_sequences_are_refused(length, served):
    assert (refusal(TrellisFormat(2, length=length)) is None) == served
