"""Error curves are exact: every option is what decomposing it would store and cost."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies_matrices import well_conditioned

from tnc.column_space import spectrum
from tnc.decompose import DenseStage, InputRotation, OutputRotation, QuantizeStage, decompose, recipe
from tnc.decompose.best import decompose_by
from tnc.errors import BudgetError
from tnc.formats import IntFormat
from tnc.metric import Metric
from tnc.planning import Base, Choice, CurveTable, Portfolio, measure_curves
from tnc.planning.curves import curves_of
from tnc.planning.fits import fit_bases
from tnc.stats import LayerStats

BASES = {
    "dense": Base(DenseStage(), compensated=False),
    "none": Base(None),
    "int4-g8": Base(QuantizeStage(IntFormat(4, group_size=8))),
    "int2-row": Base(QuantizeStage(IntFormat(2), method="rtn")),
    "int3-turned": Base(QuantizeStage(IntFormat(3)), transforms=(InputRotation(), OutputRotation())),
}
PORTFOLIO = Portfolio(BASES, {"16": None, "4": IntFormat(4)}, rank_step=2, factor_ranks=(4,))


def problem(m, n, seed, *, fisher=True, heldout=True):
    made = well_conditioned(m, n, seed, fisher=fisher)
    return made.weight, made.stats(heldout=heldout)


def test_a_portfolio_needs_no_plain_factors(tmp_path):
    """Bases without factors name no factor format that the portfolio could lack."""
    weight, stats = problem(16, 24, 0)
    portfolio = Portfolio(BASES, {"4": IntFormat(4)}, factor_ranks=(4,))
    found = measure_curves(weight, stats, portfolio)
    CurveTable({"a": found}, portfolio, (), 0, "float32", "").save(tmp_path / "curves.safetensors")
    read = CurveTable.load(tmp_path / "curves.safetensors").layers["a"].options
    assert {o.choice: o.bits for o in read} == {o.choice: o.bits for o in found.options}
    assert {option.choice.factors for option in found.options if option.choice.rank} == {"4"}
    whole = measure_curves(weight, stats, dataclasses.replace(PORTFOLIO, rank_step=99))
    alone = {o.choice.base: o.bits for o in found.options if not o.choice.rank}
    assert alone == {o.choice.base: o.bits for o in whole.options if not o.choice.rank}


def test_coarse_bases_without_factors_do_not_bound_the_ranks_of_others():
    weight, stats = problem(16, 24, 0)
    coarse = Base(QuantizeStage(IntFormat(2), method="rtn"), compensated=False)
    found = measure_curves(weight, stats, dataclasses.replace(PORTFOLIO, bases={**BASES, "coarse": coarse}))
    without = measure_curves(weight, stats, PORTFOLIO)
    assert [o for o in found.options if o.choice.base != "coarse"] == list(without.options)
    exact = Base(QuantizeStage(IntFormat(8)), compensated=False)
    bounded = measure_curves(weight, stats, dataclasses.replace(PORTFOLIO, bases={**BASES, "exact": exact}))
    limit = next(o.bits for o in bounded.options if o.choice.base == "exact")
    assert max(o.bits for o in bounded.options if o.choice.rank) < limit
    assert max(o.bits for o in without.options if o.choice.rank) >= limit


def decomposed(weight, choice, stats):
    built = PORTFOLIO.recipe(choice)
    return decompose(weight, built.stages, stats, transforms=built.transforms).report


@given(
    m=st.sampled_from([1, 5, 16]), n=st.sampled_from([8, 24]), seed=st.integers(0, 99), fisher=st.booleans(),
    heldout=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_options_are_what_decomposing_them_gives(m, n, seed, fisher, heldout, dtype):
    weight, stats = problem(m, n, seed, fisher=fisher, heldout=heldout)
    weight = weight.to(dtype)
    found = measure_curves(weight, stats, PORTFOLIO)
    assert found.shape == (m, n)
    for option in found.options:
        if option.choice.factors == "4":
            continue  # rounding decides ties by the last bit; see below
        report = decomposed(weight, option.choice, stats)
        assert option.bits == report.storage_bits
        assert option.error == pytest.approx(report.relative_error, rel=1e-6, abs=1e-7)
        if heldout:
            assert option.heldout_error == pytest.approx(report.heldout_relative_error, rel=1e-6, abs=1e-7)
        assert math.isnan(option.heldout_nats) == (not fisher)
        if fisher:
            scale = Metric(stats.hessian, stats.gradient.second).nats(weight.double())
            assert option.heldout_nats == pytest.approx(report.predicted_nats, rel=1e-6, abs=1e-12 + 1e-12 * scale)


@given(seed=st.integers(0, 99))
def test_tails_of_the_spectrum_are_the_errors(seed):
    """An independent oracle: the singular values of the residual in G ⊗ H, float64 factors."""
    weight, stats = problem(12, 16, seed)
    found = measure_curves(weight, stats, Portfolio({"none": Base(None)}, rank_step=1))
    sigma = spectrum(weight, Metric.fisher(stats)) ** 2
    for option in found.options:
        assert option.nats == pytest.approx(0.5 * float(sigma[option.choice.rank :].sum()), rel=1e-6, abs=1e-12)


def test_ranks_stop_where_the_bits_buy_more_otherwise():
    weight, stats = problem(16, 24, 0)
    found = measure_curves(weight.bfloat16(), stats, PORTFOLIO)
    dense = 16 * 24 * 16
    assert all(option.bits < dense for option in found.options if option.choice.base != "dense")
    cheap = {**BASES, "int8-row": Base(QuantizeStage(IntFormat(8)), compensated=False)}
    narrower = measure_curves(weight.bfloat16(), stats, dataclasses.replace(PORTFOLIO, bases=cheap))
    limit = next(o.bits for o in narrower.options if o.choice.base == "int8-row")
    assert all(o.bits < limit for o in narrower.options if BASES.get(o.choice.base, BASES["dense"]).compensated)


def test_bases_that_do_not_fit_are_noted():
    weight, stats = problem(6, 12, 0)
    found = measure_curves(weight, stats, PORTFOLIO)
    assert {curve.base for curve in found.curves} == {"dense", "none", "int2-row", "int3-turned"}
    assert found.notes == tuple(
        n for n in found.notes if n.startswith("int4-g8 left out: group_size=8 does not divide")
    )
    assert len(found.notes) == 1


def table(seed=0, *, fisher=True):
    layers = {}
    for name in ("a", "b"):
        weight, stats = problem(16, 24, seed, fisher=fisher)
        layers[name] = measure_curves(weight, stats, PORTFOLIO)
        seed += 1
    return CurveTable(layers, PORTFOLIO, (("a", "b"),), 1000, "float32", "f" * 64)


@pytest.mark.parametrize("fisher", [True, False])
def test_table_comes_back_from_its_file(tmp_path, fisher):
    made = table(fisher=fisher)
    made.save(tmp_path / "curves.safetensors")
    made.save(tmp_path / "curves.safetensors")  # an older file is replaced
    again = CurveTable.load(tmp_path / "curves.safetensors", fingerprint="f" * 64)
    assert again.portfolio == PORTFOLIO
    assert (again.groups, again.other_bytes, again.dtype) == (made.groups, 1000, "float32")
    assert repr(again.layers) == repr(made.layers)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.safetensors"]


def test_files_that_are_not_these_curves(tmp_path):
    path = tmp_path / "curves.safetensors"
    with pytest.raises(BudgetError, match="there are no error curves at"):
        CurveTable.load(path)
    table().save(path)
    with pytest.raises(BudgetError, match=r"are stale: .* Remove the file"):
        CurveTable.load(path, fingerprint="0" * 64)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BudgetError, match="are damaged"):
        CurveTable.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(BudgetError, match="holds something else"):
        CurveTable.load(path)
    with pytest.raises(BudgetError, match="cannot be written"):
        table().save(tmp_path / "nowhere" / "curves.safetensors")


def test_portfolio_names_and_json():
    default = Portfolio.default(group_sizes=(64, 128, None))
    assert set(default.bases) >= {"dense", "none", "int8-row", "int4-g64", "int3-g128", "int2-row"}
    refined = Portfolio({"x": Base(QuantizeStage(IntFormat(3), method="yaqa", options={"tile": 8}, refine=2))})
    for made in (default, PORTFOLIO, refined):
        assert Portfolio.from_json(made.to_json()) == made
    with pytest.raises(BudgetError, match="base 'int9' is not in the portfolio of this plan; expected one of dense"):
        default.stages(Choice("int9"))
    with pytest.raises(BudgetError, match="factor format '5' is not"):
        default.stages(Choice("dense", 0, "5"))
    with pytest.raises(BudgetError, match="offers nothing"):
        Portfolio({})
    with pytest.raises(BudgetError, match="a plan file cannot describe"):
        Portfolio({"x": Base(DenseStage(torch.float16))}).to_json()
    fields = default.to_json()
    for wrong, message in (
        ({"stage": "magic"}, "stage 'magic'"), ({"stage": "quantize", "format": None}, "no number format"),
        ({"stage": "quantize", "format": {"type": "int", "bits": 99}}, "IntFormat"),
        ({"stage": "quantize", "format": {"type": "int", "bats": 4}}, "has no field bats"),
        ({"stage": "none", "transforms": [{"type": "spin"}]}, "has the transform"),
    ):  # fmt: skip
        with pytest.raises(BudgetError, match=message):
            Portfolio.from_json({**fields, "bases": {"x": wrong}})


def test_trellises_are_rounded_from_both_sides_with_yaqa():
    weight, stats = problem(24, 32, 3)
    for method, name, path in (
        ("gptq", "trellis2", "column"), ("yaqa", "trellis2", "diagonal"), ("gptq", "trellis2_diagonal", "diagonal"),
    ):  # fmt: skip
        portfolio = Portfolio.default(method=method, formats=(name,))
        base = portfolio.bases[name]
        assert (base.stage.method, base.stage.format.path) == ("yaqa" if path == "diagonal" else "gptq", path)
        assert Portfolio.from_json(portfolio.to_json()) == portfolio
    alone = Portfolio({"dense": portfolio.bases["dense"], "trellis2": base})
    option = next(o for o in measure_curves(weight, stats, alone).options if o.choice.base == "trellis2")
    report = decompose_by(weight, recipe("yaqa_trellis", bits=2), stats).report
    assert (option.bits, option.heldout_nats) == (report.storage_bits, pytest.approx(report.predicted_nats, rel=1e-6))


def test_known_bases_are_not_fitted_again():
    weight, stats = problem(8, 16, 4)
    fits = fit_bases(weight, stats, PORTFOLIO)
    known = {name: base.term for name, base in fits.bases.items()}
    again = fit_bases(weight, stats, PORTFOLIO, known=known)
    assert all(again.bases[name].term is term for name, term in known.items())
    assert curves_of(again) == curves_of(fits) == measure_curves(weight, stats, PORTFOLIO)


def test_choices_in_words():
    assert Choice("int3-g64").describe() == "int3-g64"
    assert Choice("int3-g64", 16).describe() == "int3-g64 + rank 16 @ 16"
    assert Choice("none", 8).describe() == "rank 8 @ 16"


def test_statistics_without_a_heldout_share_fall_back_to_the_calibration_tokens():
    weight, stats = problem(8, 8, 1, heldout=False)
    assert isinstance(stats, LayerStats)
    for option in measure_curves(weight, stats, PORTFOLIO).options:
        assert option.heldout_nats == option.nats
        assert option.heldout_error == option.error


@given(seed=st.integers(0, 9))
def test_rounded_factors_are_what_decomposing_them_gives(seed):
    weight, stats = problem(16, 24, seed)
    found = measure_curves(weight, stats, PORTFOLIO)
    rounded = [option for option in found.options if option.choice.factors == "4"]
    assert {option.choice.base for option in rounded} == {"none", "int4-g8", "int2-row", "int3-turned"}
    for option in rounded:
        report = decomposed(weight, option.choice, stats)
        assert option.bits == report.storage_bits
        assert option.heldout_nats == pytest.approx(report.predicted_nats, rel=1e-6)
