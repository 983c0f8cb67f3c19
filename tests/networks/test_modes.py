"""Modes: factorizations, balance, padding."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnc.errors import ShapeError
from tnc.networks import balanced_modes, exact_modes, factorizations, site_modes
from tnc.networks.modes import check_modes, site_matrix, site_tensor
from tnc.testing.mpo_laws import mode_lists


@pytest.mark.parametrize(
    ("n", "d", "modes"),
    [
        (4096, 2, (64, 64)), (4096, 3, (16, 16, 16)), (4096, 4, (8, 8, 8, 8)), (11008, 2, (86, 128)),
        (11008, 3, (16, 16, 43)), (512, 2, (16, 32)), (1408, 2, (32, 44)), (14336, 2, (112, 128)),
        (13, 2, (2, 7)), (1, 3, (1, 1, 1)), (7, 1, (7,)), (2, 2, (1, 2)),
    ],
)  # fmt: skip
def test_balanced_modes(n, d, modes):
    assert balanced_modes(n, d) == modes


@given(n=st.integers(1, 500), d=st.integers(1, 4))
def test_balanced_modes_cover_the_features(n, d):
    modes = balanced_modes(n, d)
    assert len(modes) == d
    assert n <= prod(modes) <= 1.25 * n + 3
    assert modes[-1] <= 4 * modes[0]


@given(n=st.integers(1, 300), d=st.integers(1, 3))
def test_factorizations_are_all_of_them(n, d):
    found = set(factorizations(n, d))
    brute = {(n,)} if d == 1 else set()
    if d == 2:
        brute = {(a, n // a) for a in range(1, n + 1) if n % a == 0 and a <= n // a}
    if d == 3:
        pairs = [(a, b) for a in range(1, n + 1) if n % a == 0 for b in range(a, n + 1) if n % (a * b) == 0]
        brute = {(a, b, n // (a * b)) for a, b in pairs if b <= n // (a * b)}
    assert found == brute
    assert max(exact_modes(n, d)) == min(max(modes) for modes in found)


def test_sites_of_equal_size_are_cheapest():
    assert site_modes((512, 512), 2) == ((16, 32), (32, 16))


def test_wrong_modes_are_answered_with_factorizations():
    with pytest.raises(ShapeError, match=r"\(64, 64\), \(32, 128\)"):
        check_modes((16, 255), 4096, "out_modes")
    with pytest.raises(ShapeError, match="Factorizations of 6 into 1"):
        check_modes((), 6, "out_modes")
    with pytest.raises(ShapeError, match="integers"):
        check_modes((2.0, 3), 6, "out_modes")


@given(data=st.data(), m=st.sampled_from((1, 3, 7, 12)), n=st.sampled_from((1, 5, 8)), d=st.integers(1, 3))
def test_site_tensor_is_the_matrix_entry_by_entry(data, m, n, d):
    outs, ins = data.draw(mode_lists(m, d)), data.draw(mode_lists(n, d))
    weight = torch.arange(m * n, dtype=torch.float64).reshape(m, n) + 1
    sites = site_tensor(weight, outs, ins, torch.float64)
    assert torch.equal(site_matrix(sites, outs, ins, (m, n)), weight)
    row, column = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, n - 1))
    digits = []
    for o, i in zip(reversed(outs), reversed(ins), strict=True):
        digits.append((row % o) * i + column % i)
        row, column = row // o, column // i
    row, column = 0, 0
    assert sites[tuple(reversed(digits))] > 0
    assert float(sites.sum()) == float(weight.sum())
