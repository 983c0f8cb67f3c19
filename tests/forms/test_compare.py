"""`compare_forms`: equal bits, the truncated SVD always there, losers and absentees said, costs by hand."""

import json

import pytest
import torch
from strategies_matrices import well_conditioned

import tnc
from tnc.decompose import BitsPerWeight, LowRankStage, decompose
from tnc.formats import IntFormat
from tnc.forms import Cost, Machine, compare_forms, contenders, cost_of, measure_machine
from tnc.quant import rtn
from tnc.stats import LayerStats
from tnc.terms import Dense, LowRank, Sum

PROBLEM = well_conditioned(16, 24, 0, fisher=True)
WEIGHT = PROBLEM.weight.float()


@pytest.fixture(scope="module")
def found():
    return compare_forms(WEIGHT, PROBLEM.stats(heldout=True), bits=8)


def test_every_form_is_there_and_within_the_bits(found):
    assert found.rows[0].form == "truncated SVD"
    assert [row.form for row in found.rows] == [each.name for each in contenders((16, 24), 8)]
    for row in found.rows:
        if row.report is not None:
            assert row.report.bits_per_weight <= 8 and row.report.lower_bound <= row.report.relative_error
            assert row.report.heldout_relative_error is not None
    assert [cost.tokens for cost in found.rows[0].costs] == [1, 16, 256] == [cost.tokens for cost in found.dense]


def test_rows_are_what_decompose_gives(found):
    stages = (LowRankStage(BitsPerWeight(8), dtype=torch.float16),)
    expected = decompose(WEIGHT, stages, PROBLEM.stats(heldout=True)).report
    assert found.rows[0].report.to_json() | {"seconds": 0} == expected.to_json() | {"seconds": 0}


def test_the_winner_has_the_smallest_nats_and_the_structured_one_no_codes(found):
    assert found.measure == "predicted_nats"
    losses = {row.form: row.report.predicted_nats for row in found.rows if row.report is not None}
    assert losses[found.winner.form] == min(losses.values())
    assert found.structured_winner.report.bits is None and "int" in found.winner.form
    coded = {row.form for row in found.rows if row.coded}
    assert coded == {row.form for row in found.rows if "int" in row.form and row.report is not None}
    assert found.structured_winner.form not in coded


def test_json(found):
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert again["winner"] == found.winner.form and len(again["rows"]) == len(found.rows)
    assert again["rows"][0]["report"]["storage_bits"] == found.rows[0].report.storage_bits


def test_what_does_not_fit_has_a_reason_and_what_decides_without_statistics_is_the_error():
    chosen = [
        each for each in contenders((16, 24), 3, quantizer="rtn") if each.name in ("truncated SVD", "int2", "int4")
    ]
    found = compare_forms(WEIGHT, bits=3, forms=chosen)
    absent = {row.form: row.reason for row in found.rows if row.report is None}
    assert set(absent) == {"int2", "int4"} and "stores 4.333 bits per weight" in absent["int2"]
    assert found.measure == "relative_error" and found.winner.form == "truncated SVD"
    heldout = LayerStats(PROBLEM.stats().inputs, PROBLEM.stats().inputs)
    assert compare_forms(WEIGHT, heldout, bits=3, forms=chosen[:1]).measure == "heldout_relative_error"


def test_cost_by_hand():
    machine = Machine("m", 1e9, 1e9, 1e-5)
    cost = cost_of(LowRank(torch.zeros(30, 2), torch.zeros(2, 20)), 4, machine)
    moved = (2 * 50 + 4 * 50) * 4
    assert cost == Cost(4, 100.0, pytest.approx(moved / 1e9 + 2e-5), "((x right) left)")
    dense = cost_of(Dense(torch.zeros(30, 20)), 1000, machine)
    assert dense.macs_per_token == 600 and dense.seconds == pytest.approx(2 * 600 * 1000 / 1e9 + 1e-5)
    base = rtn(torch.randn(30, 20), IntFormat(4))
    both = Sum((base, LowRank(torch.zeros(30, 2), torch.zeros(2, 20))))
    apart = cost_of(both, 1, machine)
    assert apart.macs_per_token == 600 + 100 and apart.seconds > 8 * 600 / 1e9


def test_this_machine_can_be_measured():
    machine = measure_machine()
    assert machine.flops_per_second > 1e8 and machine.bytes_per_second > 1e8 and 0 < machine.seconds_per_call < 1


def test_it_is_public():
    assert tnc.compare_forms is compare_forms
