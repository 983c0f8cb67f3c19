"""The encoder in C: bit for bit that in torch."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc import compiled
from tnc.formats import CODES, TrellisFormat
from tnc.quant import QUANTIZERS, viterbi, viterbi_compiled
from tnc.quant.trellis import trellis_of
from tnc.quant.viterbi import Trellis
from tnc.stats import LayerStats

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
FEW = settings(max_examples=max(settings.default.max_examples // 2, 10))
SIZES = ((2, 6), (2, 8), (2, 12), (3, 9), (3, 12), (4, 8), (4, 12))


@st.composite
def problems(draw):
    bits, state_bits = draw(st.sampled_from(SIZES))
    length, count = draw(st.integers(state_bits // bits + 1, 90)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    levels = CODES[draw(st.sampled_from(tuple(CODES)))](torch.arange(1 << state_bits))
    if draw(st.booleans()):
        levels = levels.round()  # few different numbers: paths of equal costs everywhere
    targets = torch.randn(length, count, generator=generator)
    if draw(st.booleans()):
        targets = targets.round()
    weights = torch.rand(length, count, generator=generator) ** draw(st.sampled_from((0, 1, 8)))
    weights *= (torch.rand(length, count, generator=generator) < draw(st.sampled_from((0.5, 1.0)))).float()
    return Trellis.of(levels, bits), targets * draw(st.sampled_from((1e-6, 1.0, 1e6))), weights


@given(problem=problems())
@FEW
def test_codes_and_bounds_are_those_of_torch(problem):
    trellis = problem[0]
    assert viterbi_compiled.refusal(trellis) is None
    assert torch.equal(viterbi_compiled.encode(*problem), viterbi.encode(*problem))
    assert torch.equal(viterbi_compiled.least_costs(*problem), viterbi.least_costs(*problem))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(bits, threads, monkeypatch):
    generator, trellis = torch.Generator().manual_seed(bits), trellis_of(TrellisFormat(bits))
    problem = trellis, torch.randn(64, 7, generator=generator), torch.rand(64, 7, generator=generator)
    wanted = viterbi.encode(*problem)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(viterbi_compiled.encode(*problem), wanted)


def test_other_trellises_are_refused():
    assert "2, 3 or 4 bits" in viterbi_compiled.refusal(Trellis.of(torch.randn(32), 1))
    assert "16 groups" in viterbi_compiled.refusal(Trellis.of(torch.randn(16), 2))


@pytest.mark.parametrize("method", ["rtn", "gptq", "yaqa"])
@pytest.mark.parametrize("path", ["column", "diagonal"])
def test_without_a_compiler_the_codes_are_the_same_and_the_report_says_so(method, path, monkeypatch):
    weight = torch.randn(24, 12, generator=torch.Generator().manual_seed(4))
    stats = LayerStats.from_hessian(torch.eye(12) + 0.3, torch.eye(24) + 0.2, tokens=9)
    format = TrellisFormat(2, state_bits=8, path=path)
    if (method, path) == ("yaqa", "column"):
        pytest.skip("refused")
    first = QUANTIZERS[method].run(weight, stats, format)
    assert not any("encoder" in note for note in first.fallbacks)
    compiled.library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        second = QUANTIZERS[method].run(weight, stats, format)
    finally:
        compiled.library.cache_clear()
    assert torch.equal(first.term.codes, second.term.codes) and torch.equal(first.term.scale, second.term.scale)
    assert any("encoder ran in torch, not in C, with the same codes" in note for note in second.fallbacks)
