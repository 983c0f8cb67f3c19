"""What the strategies draw, what they refuse, and what importing them needs."""

import subprocess
import sys

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

import tnc.testing
from tnc.errors import RecipeError, StatsError
from tnc.formats import SUPPORTED_BITS, TABLES
from tnc.metric import Metric
from tnc.terms import Dense, LowRank, Product, Sum
from tnc.testing import (
    HESSIANS,
    METRICS,
    SPECTRA,
    expressions,
    formats,
    hessians,
    int_formats,
    make_hessian,
    make_problem,
    make_weight,
    weighted_problems,
    weights,
)  # fmt: skip
from tnc.testing.oracle import eckart_young, error_in, largest_gain, magnitude, storage_rounding

QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(weight=weights())
def test_weights_are_finite_and_small(weight):
    assert weight.is_floating_point() and torch.isfinite(weight).all()
    assert max(weight.shape) <= 24 and torch.isfinite(4 * weight).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_largest_entry_is_the_scale(spectrum):
    for dtype in (torch.float64, torch.bfloat16):
        weight = make_weight((5, 7), spectrum=spectrum, scale=1e-6, dtype=dtype, seed=3)
        assert weight.shape == (5, 7) and weight.dtype == dtype
        expected = 0 if spectrum == "zero" else 1e-6
        assert float(weight.abs().max()) == pytest.approx(expected, rel=1e-2)


def test_spectra_are_as_prescribed():
    def values(spectrum):
        s = torch.linalg.svdvals(make_weight((6, 9), spectrum=spectrum, dtype=torch.float64))
        return (s / s[0]).tolist()

    assert values("flat") == pytest.approx([1] * 6)
    assert values("power") == pytest.approx([1 / i for i in range(1, 7)])
    assert values("exponential") == pytest.approx([2.0**-i for i in range(6)])
    assert values("low_rank") == pytest.approx([1, 1, 0, 0, 0, 0], abs=1e-12)
    assert values("constant") == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-12)
    assert 0 < values("low_rank_noise")[2] < 0.2
    columns = make_weight((6, 9), spectrum="outlier_columns").norm(dim=0)
    rows = make_weight((6, 9), spectrum="outlier_rows").norm(dim=1)
    assert columns.max() > 5 * columns.median() and rows.max() > 5 * rows.median()


@QUICK
@given(data=st.data(), size=st.integers(1, 24))
def test_hessians_are_symmetric_and_semidefinite(data, size):
    hessian = data.draw(hessians(size))
    assert hessian.shape == (size, size) and hessian.dtype == torch.float64
    assert torch.equal(hessian, hessian.T)
    values = torch.linalg.eigvalsh(hessian)
    assert float(values[0]) >= -1e-12 * float(values[-1].abs())


def test_kinds_of_hessians():
    eye = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(make_hessian(8, kind="identity", scale=3.0), 9 * eye)
    diagonal = make_hessian(8, kind="diagonal")
    assert torch.equal(diagonal, torch.diag(diagonal.diagonal())) and bool((diagonal.diagonal() > 0).all())
    ranks = {kind: int(torch.linalg.matrix_rank(make_hessian(8, kind=kind))) for kind in HESSIANS}
    assert ranks == {
        "identity": 8, "diagonal": 8, "full": 8, "deficient": 4, "ill_conditioned": 8, "dead_column": 7, "zero": 0,
    }  # fmt: skip
    values = torch.linalg.eigvalsh(make_hessian(8, kind="ill_conditioned"))
    assert float(values[-1] / values[0]) == pytest.approx(1e8, rel=1e-3)
    assert int((make_hessian(8, kind="dead_column").diagonal() == 0).sum()) == 1


@QUICK
@given(problem=weighted_problems())
def test_problems_fit_together_and_rebuild_from_their_repr(problem):
    problem.stats.check_weight(problem.weight)
    again = eval(repr(problem), {"tnc": tnc, "torch": torch})
    assert torch.equal(again.weight, problem.weight) and again.scale == problem.scale
    assert torch.equal(again.stats.hessian, problem.stats.hessian)
    assert (again.stats.heldout is None) == (problem.stats.heldout is None)
    if problem.stats.heldout is not None:
        assert torch.equal(again.stats.heldout.second, problem.stats.heldout.second)
    assert error_in(problem.metric, problem.weight) <= problem.scale * (1 + 1e-6) + 1e-300


@pytest.mark.parametrize(
    "wanted",
    (
        lambda p: p.metric.gradient is not None,
        lambda p: p.stats.heldout is not None and p.stats.gradient is None,
        lambda p: p.metric.hessian is not None and p.metric.hessian.ndim == 1,
        lambda p: p.weight.shape[0] == 1 < p.weight.shape[1],
        lambda p: p.weight.shape[1] == 1 < p.weight.shape[0],
        lambda p: p.weight.dtype == torch.float16,
        lambda p: 0 < p.weight.abs().max() < 1e-5,
        lambda p: p.weight.abs().max() > 1e5,
        lambda p: not p.stats.hessian.any(),
    ),
)
def test_the_whole_domain_is_reached(wanted):
    find(weighted_problems(), wanted, settings=settings(max_examples=2000, deadline=None, database=None))


@given(data=st.data(), columns=st.integers(1, 30))
def test_formats_fit(data, columns):
    format = data.draw(formats(columns))
    layout = format.layout((3, columns))
    assert layout.stored >= columns and (layout.stored == columns or format.pad)
    assert data.draw(formats()).group_size is None
    whole = data.draw(int_formats(columns))
    assert columns % whole.group_of(columns) == 0 and data.draw(int_formats()).group_size is None


@pytest.mark.parametrize("kind", [*(f"int{b}" for b in SUPPORTED_BITS), *TABLES, "trellis2", "trellis3", "trellis4"])
def test_every_kind_of_format_is_drawn(kind):
    def named(format):
        return format.describe().split()[0] == kind

    find(formats(6), named, settings=settings(max_examples=2000, deadline=None, database=None))


@QUICK
@given(data=st.data())
def test_expressions_take_the_shape_asked_for(data):
    assert data.draw(expressions((3, 7))).shape == (3, 7)
    assert data.draw(expressions(kinds=["diagonal"], depth=1)).shape[0] >= 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda: make_weight((2, 2), spectrum="x"), RecipeError, "unknown spectrum 'x'; expected one of flat, power"),
        (lambda: make_hessian(2, kind="x"), RecipeError, "unknown kind of second moment 'x'; expected one of identity"),
        (lambda: make_problem((2, 2), metric="x"), RecipeError, "unknown metric 'x'; expected one of identity, rms"),
        (lambda: make_problem((2, 2), metric="fisher"), StatsError, "got gradient=None; pass a kind such as"),
        (lambda: expressions(kinds=["x"]), RecipeError, "no strategy for terms of kind 'x'; expected one of dense"),
        (lambda: expressions((2, 3), kinds=["diagonal"]), RecipeError, "diagonal terms are square; got shape"),
    ),
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_oracles_by_hand():
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    metric = Metric(torch.tensor([1.0, 16.0]).double(), torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double())
    assert eckart_young(weight, metric).tolist() == pytest.approx([6.0, 4.0])
    assert error_in(metric, weight) == pytest.approx(52**0.5)
    assert largest_gain(metric) == pytest.approx(8.0)
    assert largest_gain(Metric()) == 1.0


@QUICK
@given(problem=weighted_problems(dtypes=(torch.float64,), metrics=METRICS[3:]))
def test_the_oracle_is_the_trace(problem):
    H, G, E = problem.metric.hessian, problem.metric.gradient, problem.weight
    left = E.T if G is None else E.T @ G
    trace = float(torch.trace(left @ E @ H))
    assert error_in(problem.metric, E) ** 2 == pytest.approx(trace, rel=1e-6, abs=1e-12 * problem.scale**2)


def test_magnitude_does_not_cancel():
    one = Dense(torch.tensor([[1.0]]))
    minus = Dense(torch.tensor([[-1.0]], dtype=torch.bfloat16))
    assert float(magnitude(Sum((one, minus)))) == 2.0
    pair = Product((Dense(torch.tensor([[1.0, -1.0]])), Dense(torch.tensor([[1.0], [1.0]]))))
    assert float(magnitude(pair)) == 2.0
    assert float(magnitude(LowRank(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [1.0]])))) == 2.0
    assert storage_rounding(Sum((one, minus))) == pytest.approx(2 * torch.finfo(torch.bfloat16).eps)


def test_public_names():
    assert len(set(tnc.testing.__all__)) == len(tnc.testing.__all__)  # ruff keeps them sorted
    assert all(hasattr(tnc.testing, name) for name in tnc.testing.__all__)


def test_hypothesis_is_asked_for_only_by_testing():
    code = (
        "import sys, tnc, tnc.terms\n"
        "assert 'hypothesis' not in sys.modules\n"
        "sys.modules['hypothesis'] = None\n"
        "try:\n"
        "    import tnc.testing\n"
        "except ImportError as error:\n"
        "    from tnc.errors import TNCError\n"
        "    assert isinstance(error, TNCError), type(error)\n"
        "    assert 'pip install \"tnc[test]\"' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('imported without hypothesis')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
