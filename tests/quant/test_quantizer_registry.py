import pytest
import torch
from quant_cases import case

from tnc import quant
from tnc.decompose import QuantizeStage, decompose
from tnc.errors import RecipeError, StatsError
from tnc.formats import IntFormat
from tnc.quant import QUANTIZERS, QuantizerEntry, QuantizerResult, quantizer, register_quantizer, rtn

FORMAT = IntFormat(3, 8)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_entry_runs_and_says_where_it_is_from(name):
    c = case(0, 4, 2, 8, 3)
    entry = quantizer(name)
    result = entry.run(c.weight, c.stats, c.format)
    assert result.term.shape == (4, 16)
    assert result.term.format == c.format
    assert entry.summary
    assert entry.source


def test_the_door_is_the_function():
    c = case(1, 4, 2, 8, 3)
    assert torch.equal(quantizer("GPTQ").run(c.weight, c.stats, FORMAT).term.codes,
                       quant.gptq_with_notes(c.weight, c.stats, FORMAT).term.codes)  # fmt: skip
    assert torch.equal(quantizer("rtn").run(c.weight, None, FORMAT).term.codes, rtn(c.weight, FORMAT).codes)


def test_stage_passes_its_options_on():
    c = case(2, 4, 2, 8, 3)
    stage = QuantizeStage(FORMAT, damping=0.5, clip_ratios=(0.7,), options={"block_size": 3})
    result = decompose(c.weight, [stage], c.stats)
    assert result.report.damping == 0.5
    expected = quant.gptq_with_notes(c.weight, c.stats, FORMAT, damping=0.5, clip_ratios=(0.7,), block_size=3)
    assert torch.equal(result.operator.codes, expected.term.codes)


def test_errors():
    with pytest.raises(RecipeError, match=r"method='magic' is unknown; expected one of .*gptq.*"):
        quantizer("magic")
    with pytest.raises(RecipeError, match=r"quantizer 'rtn' does not take damping; it takes clip_ratios\."):
        QuantizeStage(FORMAT, method="rtn", options={"damping": 1.0})
    with pytest.raises(StatsError, match=r"gptq needs calibration statistics"):
        quantizer("gptq").run(torch.ones(2, 8), None, FORMAT)
    with pytest.raises(RecipeError, match=r"quantizer 'gptq' is already registered \(arXiv:2210.17323\)"):
        register_quantizer("GPTQ", QUANTIZERS["gptq"])


def test_a_quantizer_of_ones_own(monkeypatch):
    def run(weight, stats, format):
        return QuantizerResult(rtn(weight, format), fallbacks=("said so",))

    monkeypatch.setitem(QUANTIZERS, "mine", QuantizerEntry("", "", run))
    c = case(3, 4, 2, 8, 3)
    result = decompose(c.weight, [QuantizeStage(FORMAT, method="mine")], c.stats)
    assert result.report.fallbacks[0] == "said so"
    assert torch.equal(result.operator.codes, rtn(c.weight, FORMAT).codes)
