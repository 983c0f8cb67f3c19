"""Feedback along anti-diagonals against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnc.quant.line_feedback import LineFeedback, line_of, line_rows


def unit_upper(size, generator):
    return torch.randn(size, size, generator=generator, dtype=torch.float64).triu(1) / 3 + torch.eye(size).double()


@given(
    shape=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    width=st.sampled_from((1, 2, 5, 32)),
    two_sided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_line_gets_what_the_entries_before_it_add(shape, width, two_sided, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    upper, right = unit_upper(rows, generator), unit_upper(columns, generator)
    errors = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    wanted = (upper.T if two_sided else torch.eye(rows).double()) @ errors @ right - errors
    feedback = LineFeedback(upper if two_sided else None, right, rows, width)
    for number in range(rows + columns - 1):
        found = feedback.targets(number)
        assert torch.allclose(found, line_of(wanted, number), rtol=0, atol=1e-10 * float(wanted.abs().max() + 1))
        feedback.record(number, line_of(errors, number))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (3, 5), (5, 3)])
def test_lines_are_views_of_all_entries_once(shape):
    matrix = torch.zeros(3, *shape)[1]  # not at the start of its storage
    for number in range(sum(shape) - 1):
        rows = line_rows(shape, number)
        line_of(matrix, number).add_(1)
        assert all(float(matrix[i, number - i]) == 1 for i in range(rows.start, rows.stop))
    assert torch.equal(matrix, torch.ones(shape))
