"""Choosing a kernel: deterministic, explained, and refused with the reason."""

import random

import pytest
import torch

from tnc.errors import BackendError
from tnc.kernels import Candidate, Kernel, backends, choose, register_kernel, table
from tnc.terms import Dense

CPU = torch.device("cpu")
OPERATOR = Dense(torch.ones(3, 5))


class Nothing:
    def __call__(self, x, tensors):
        return x

    def describe(self):
        return "nothing"


def row(name, priority, reason=None):
    return Kernel(name, lambda operator, device, dtype: reason, lambda operator: Nothing(), priority)


@pytest.fixture
def rows(monkeypatch):
    """The table with rows of ours beside those that serve everything, put back afterwards."""
    everywhere = {name: table._KERNELS[name] for name in ("einsum", "reference")}
    monkeypatch.setattr(table, "_KERNELS", everywhere)
    return table._KERNELS


def chosen(**kwargs):
    return next(c.name for c in choose(OPERATOR, CPU, torch.float32, **kwargs)[1] if c.chosen)


def test_the_table_holds_reference_and_einsum():
    assert {"auto", "einsum", "reference"} <= set(backends())
    assert chosen() == "einsum"
    assert chosen(backend="reference") == "reference"
    assert chosen(backend=" Einsum ") == "einsum"


def test_auto_takes_the_highest_priority_that_serves(rows):
    register_kernel(row("fast", 99, "needs a GPU"))
    register_kernel(row("good", 50))
    bound, report = choose(OPERATOR, CPU, torch.float32)
    assert isinstance(bound, Nothing)
    assert report == (
        Candidate("fast", False, "needs a GPU"),
        Candidate("good", True, "highest priority"),
        Candidate("einsum", False, "good comes first (priority 50 over 10)"),
        Candidate("reference", False, "good comes first (priority 50 over 0)"),
    )


def test_a_named_backend_wins_over_priority_and_the_report_says_so(rows):
    register_kernel(row("good", 50))
    _, report = choose(OPERATOR, CPU, torch.float32, backend="reference")
    assert {c.name: c.reason for c in report} == {
        "good": "the caller named reference",
        "einsum": "the caller named reference",
        "reference": "named by the caller",
    }


def test_choice_does_not_depend_on_the_order_of_registration(rows):
    names = ["c", "a", "b", "d"]
    real = dict(rows)
    for seed in range(6):
        rows.clear()
        rows.update(real)
        for name in random.Random(seed).sample(names, len(names)):
            register_kernel(row(name, 70))
        assert [c.name for c in choose(OPERATOR, CPU, torch.float32)[1]] == [
            *sorted(names),
            "einsum",
            "reference",
        ]
        assert chosen() == "a"


def test_serves_sees_operator_device_and_dtype(rows):
    seen = []
    register_kernel(Kernel("spy", lambda *given: seen.append(given) or "no", lambda operator: Nothing(), 1))
    choose(OPERATOR, CPU, torch.float16)
    assert seen == [(OPERATOR, CPU, torch.float16)]


def test_unknown_backend_lists_the_valid_ones(rows):
    message = r"unknown backend 'trition'; expected one of auto, einsum, reference"
    with pytest.raises(BackendError, match=message):
        choose(OPERATOR, CPU, torch.float32, backend="trition")


def test_named_backend_that_cannot_serve_gives_the_reason_and_what_can(rows):
    register_kernel(row("fast", 99, "needs a GPU"))
    message = r"'fast' cannot serve this operator: needs a GPU.*backend=\"auto\" or one of einsum, reference"
    with pytest.raises(BackendError, match=message):
        choose(OPERATOR, CPU, torch.float32, backend="fast")


@pytest.mark.parametrize("name", ["einsum", "auto", "Fast", " fast"])
def test_taken_reserved_and_mixed_case_names_are_refused(rows, name):
    before = dict(rows)
    with pytest.raises(BackendError, match=r"taken, reserved or not lower case.*auto, einsum, reference"):
        register_kernel(row(name, 1))
    assert rows == before
