"""Hadamard matrices of every construction, against scipy, brute force and the definition."""

import numpy as np
import pytest
import scipy.linalg
import torch

from tnc.errors import ShapeError
from tnc.hadamard import construction, hadamard_factors, hadamard_matrix
from tnc.hadamard.constructions import _WILLIAMSON
from tnc.hadamard.finite_field import character_matrix, prime_power

# Orders that the largest admissible blocks of real layer widths are made of, and all small ones.
ORDERS = [n for n in range(1, 181) if construction(n)] + [212, 244, 344]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order):
    matrix = hadamard_matrix(order).to(torch.int32)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int32))


def test_powers_of_two_are_scipys():
    for p in range(9):
        assert np.array_equal(hadamard_matrix(2**p).numpy(), scipy.linalg.hadamard(2**p))


def test_orders_that_are_built():
    built = {n for n in range(4, 181, 4) if construction(n) or hadamard_factors(n)}
    assert built == set(range(4, 181, 4))
    assert construction(156) == "baumert-hall" and construction(4 * 69) == "paley II"
    assert construction(28) == construction(12) == "paley I" and construction(36) == construction(52) == "paley II"
    assert construction(172) == construction(92) == construction(116) == "williamson"
    assert construction(6) is None and construction(0) is None and construction(-4) is None


def test_an_unknown_order_is_refused():
    with pytest.raises(ShapeError, match=r"no Hadamard matrix of order 188 is known here; expected 2\^p"):
        hadamard_matrix(188)


@pytest.mark.parametrize(("q", "found"), [(1, None), (6, None), (7, (7, 1)), (49, (7, 2)), (243, (3, 5)), (36, None)])
def test_prime_powers(q, found):
    assert prime_power(q) == found


@pytest.mark.parametrize("q", [3, 5, 7, 9, 13, 25, 27, 49])
def test_character_matrix(q):
    Q = character_matrix(q).to(torch.int64)
    assert torch.equal(Q.abs().sum(1), torch.full((q,), q - 1)) and not bool(Q.sum(1).any())
    assert torch.equal(Q.T, Q if q % 4 == 1 else -Q)
    assert torch.equal(Q @ Q.T, q * torch.eye(q, dtype=torch.int64) - 1)


def test_character_of_a_prime_is_legendres_symbol():
    legendre = [0, *(1 if pow(a, 6, 13) == 1 else -1 for a in range(1, 13))]
    assert character_matrix(13)[:, 0].tolist() == legendre


@pytest.mark.parametrize("t", sorted(_WILLIAMSON))
def test_williamson_rows_are_symmetric_with_flat_total_spectrum(t):
    rows = np.array([[1 if c == "+" else -1 for c in row] for row in _WILLIAMSON[t]])
    assert np.array_equal(rows[:, 1:], rows[:, :0:-1])
    assert np.allclose((np.fft.fft(rows).real ** 2).sum(0), 4 * t)


def test_williamsons_172_is_found_by_search():
    """The rows invariant under i -> 6 i: 128 candidates, matched in pairs."""
    t = 43
    orbits = {frozenset(s * 6**e * i % t for e in range(3) for s in (1, -1)) for i in range(1, t)}
    orbits = sorted(map(sorted, orbits))
    rows = np.ones((2 ** len(orbits), t))
    for c in range(len(rows)):
        for k, orbit in enumerate(orbits):
            rows[c, orbit] = -1 if c >> k & 1 else 1
    spectra = np.rint((np.fft.fft(rows).real ** 2)[:, [0, *(o[0] for o in orbits)]] * 1e6)
    sums = (spectra[:, None] + spectra[None]).reshape(-1, spectra.shape[1])
    pairs = {tuple(np.rint(v / 1e3)) for v in sums}
    assert any(tuple(np.rint((4e6 * t - v) / 1e3)) in pairs for v in sums)
