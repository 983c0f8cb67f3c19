"""What a budget says, in both of its spellings."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnc.decompose import BitsPerWeight, RelativeError
from tnc.errors import BudgetError
from tnc.planning.budget import (
    Bytes,
    Latency,
    Nats,
    PerplexityIncrease,
    Speedup,
    bits_within,
    describe_budget,
    parse_budget,
)

READ = [
    ("bpw=3.5", BitsPerWeight(3.5)), ("bytes=1.2GB", Bytes(1_200_000_000)), ("bytes = 2 MiB", Bytes(2 * 2**20)),
    ("bytes=123", Bytes(123)), ("nats=0.02", Nats(0.02)), ("ppl=+2%", PerplexityIncrease(0.02)),
    ("ppl=0.02", PerplexityIncrease("2 %")), ("error=0.02", RelativeError(0.02)), ("error=2%", RelativeError(0.02)),
    ("latency=12ms", Latency(0.012)), ("latency=850us", Latency(850e-6)), ("latency=0.5", Latency("0.5 s")),
    ("speedup=2x", Speedup(2)), ("SPEEDUP=1.5", Speedup(1.5)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "budget"), READ)
def test_reading(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("budget", [budget for _, budget in READ])
def test_words_are_read_back(budget):
    again = parse_budget(describe_budget(budget))
    assert type(again) is type(budget)
    assert again.value == pytest.approx(budget.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3.5", "expected one of bpw=3.5, bytes="), ("size=3", "'size=3' is unknown"), ("bpw=", "cannot be read"),
        ("bpw=-1", "must be positive"), ("bytes=1.2.3GB", "is no size"), ("bytes=2 parsecs", "is no size"),
        ("bytes=0", "at least 1"), ("nats=0", "must be positive"), ("nats=inf", "finite"), ("ppl=two", "is no share"),
        ("ppl=-2%", "must be positive"), ("error=1.5", r"outside \[0, 1\)"), ("latency=12 days", "is no time"),
        ("latency=0ms", "must be positive"), ("speedup=0x", "must be positive"), ("speedup=fast", "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_explained(text, message):
    with pytest.raises(BudgetError, match=message):
        parse_budget(text)


def test_perplexity_increase_in_nats():
    assert PerplexityIncrease("2%").nats == pytest.approx(math.log(1.02))


def test_fraction_of_a_byte_is_cut():
    assert Bytes("1.0005kB") == Bytes(1000)
    assert Bytes("1KiB").bits == 8192
    with pytest.raises(BudgetError, match="whole number"):
        Bytes(1.5)


@given(bpw=st.floats(1e-3, 64), elements=st.integers(1, 10**12))
def test_bits_within_is_the_largest_whose_quotient_fits(bpw, elements):
    bits = bits_within(bpw, elements)
    assert bits / elements <= bpw < (bits + 1) / elements
