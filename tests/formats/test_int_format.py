"""`IntFormat`: the bits it takes, the groups it makes and what it refuses."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnc.errors import FormatError, TNCError
from tnc.formats import SUPPORTED_BITS, IntFormat


def test_supported_bits():
    assert SUPPORTED_BITS == (2, 3, 4, 5, 6, 8)
    assert [IntFormat(b).levels for b in SUPPORTED_BITS] == [4, 8, 16, 32, 64, 256]


@given(bits=st.integers(-20, 40).filter(lambda b: b not in SUPPORTED_BITS))
def test_other_widths_are_refused(bits):
    with pytest.raises(
        FormatError, match=rf"IntFormat\(bits={bits}\) is not supported; expected one of 2, 3, 4, 5, 6, 8"
    ):
        IntFormat(bits)


@pytest.mark.parametrize("group", (0, -1, -128))
def test_empty_groups_are_refused(group):
    with pytest.raises(FormatError, match=rf"group_size={group}\) must be at least 1; use None"):
        IntFormat(4, group_size=group)


@given(columns=st.integers(1, 300), group=st.integers(1, 300))
def test_a_group_divides_the_row_or_is_refused(columns, group):
    format = IntFormat(4, group_size=group)
    if columns % group == 0:
        assert format.group_of(columns) == group
    else:
        with pytest.raises(FormatError, match=rf"group_size={group} does not divide in_features={columns}") as caught:
            format.group_of(columns)
        listed = str(caught.value).split("such as ")[1].split(", or None")[0]
        assert all(columns % int(d) == 0 for d in listed.split(", "))


def test_the_error_lists_divisors_of_eight_or_more():
    with pytest.raises(FormatError, match=r"expected a divisor such as 8, 12, 16, 24, 48, or None for one group a row"):
        IntFormat(4, group_size=7).group_of(48)


def test_no_group_size_is_one_group_a_row():
    assert IntFormat(3).group_of(17) == 17


def test_formats_are_values():
    assert IntFormat(4, 128) == IntFormat(4, group_size=128, symmetric=False)
    assert len({IntFormat(4), IntFormat(4), IntFormat(4, symmetric=True)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        IntFormat(4).bits = 3  # type: ignore[misc]


def test_a_format_error_is_a_value_error_of_the_library():
    assert issubclass(FormatError, ValueError) and issubclass(FormatError, TNCError)
