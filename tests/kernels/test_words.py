"""Codes in the kernels' order: every code where the docstring says, and back bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnc.kernels.words import LOW_BITS, code_words, codes_of, group_words, groups_of, unit_of

BITS = [2, 3, 4, 8]


def drawn(seed, high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
@given(rows=st.integers(1, 9), columns=st.integers(1, 600), seed=st.integers(0, 999))
def test_codes_come_back(bits, rows, columns, seed):
    codes = drawn(seed, 2**bits, rows, columns)
    planes = code_words(codes, bits)
    assert torch.equal(codes_of(planes, bits, columns), codes.to(torch.uint8))
    units = -(-columns // unit_of(bits))
    assert [tuple(plane.shape) for plane in planes] == [(units, rows, 16), (units, rows, 8)][: len(planes)]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_where_the_kernels_look(bits):
    """Bit by bit from the definition: half word h of a unit holds columns h, h + 32, ..."""
    rows, columns, low = 3, 2 * unit_of(bits), LOW_BITS[bits]
    codes = drawn(1, 2**bits, rows, columns)
    planes = [plane.numpy().view("uint16") for plane in code_words(codes, bits)]
    for row in range(rows):
        for column in range(columns):
            unit, (c, h) = column // unit_of(bits), divmod(column % unit_of(bits), 32)
            code = (int(planes[0][unit, row, h]) >> (low * c)) & (2**low - 1)
            if bits == 3:
                bit = 4 * (c // 2) + 2 * (h // 16) + c % 2
                code |= ((int(planes[1][unit, row, h % 16]) >> bit) & 1) << 2
            assert code == codes[row, column]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(rows=st.integers(1, 9), groups=st.integers(1, 7), seed=st.integers(0, 999))
def test_scales_and_zeros_come_back(dtype, rows, groups, seed):
    scale = drawn(seed, 2**16, rows, groups).to(torch.int32).to(torch.int16).view(dtype)  # every bit pattern, NaN too
    zero = drawn(seed + 1, 256, rows, groups)
    words = group_words(scale, zero)
    assert words.shape == (groups, rows) and words.dtype == torch.int32
    again, zeros = groups_of(words, dtype)
    assert torch.equal(again.view(torch.int16), scale.view(torch.int16)) and torch.equal(zeros, zero.to(torch.uint8))
