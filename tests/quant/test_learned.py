import pytest
import torch
from quant_cases import case, hessian_of

from tnc.errors import FormatError, RecipeError, StatsError
from tnc.formats import IntFormat, TableFormat, number_format
from tnc.metric import Metric
from tnc.quant import autoround, learned_clipping, rtn, yaqa
from tnc.stats import LayerStats
from tnc.testing import check_quantizer, entry_formats

FORMATS = (
    IntFormat(2, 8), IntFormat(4, None, True), number_format("nf4", group_size=8), TableFormat("e2m1", 8, scale="e8m0"),
    number_format("fp8_e4m3_tensor"),
)  # fmt: skip


def problem(seed, rows, columns, *, fisher=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    hessian = hessian_of(columns, 4 * columns, generator)
    gradient = hessian_of(rows, 4 * rows, generator) if fisher else None
    return weight, LayerStats.from_hessian(hessian, gradient, tokens=9)


def squared(weight, term, stats):
    return Metric.auto(stats).squared_norm(weight.double() - term.to_dense().double())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fisher", [False, True])
def test_never_worse_than_its_start_in_any_format(format, fisher):
    weight, stats = problem(0, 8, 16, fisher=fisher)
    for method, start in ((autoround, "rtn"), (autoround, "yaqa"), (learned_clipping, "rtn")):
        options = {} if method is learned_clipping else {"start": start}
        first = rtn(weight, format, stats=stats) if start == "rtn" else yaqa(weight, stats, format).term
        found = method(weight, stats, format, steps=10, **options).term
        assert found.format == format
        assert squared(weight, found, stats) <= squared(weight, first, stats)


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.9), (4, 0.9)])
def test_learns_better_codes_than_nearest(bits, limit):
    ratios = []
    for seed in range(4):
        weight, stats = problem(seed, 24, 32)
        first = rtn(weight, IntFormat(bits, 16), stats=stats)
        found = autoround(weight, stats, IntFormat(bits, 16), steps=100).term
        ratios.append(squared(weight, found, stats) / squared(weight, first, stats))
    assert sum(ratios) / len(ratios) < limit


def test_every_code_is_within_a_step_of_nearest():
    # |V| <= 1/2: the code is round(w/s + V)
    weight, stats = problem(1, 12, 24)
    term = autoround(weight, stats, IntFormat(4, 8), steps=50).term
    scale = term.layout.spread(term.scales(torch.float32))
    inside = (term.integer_codes() > 0) & (term.integer_codes() < 15)
    assert float(((weight - term.to_dense()) / scale).abs()[inside].max()) <= 1 + 1e-5


def test_clipping_is_learnt_from_the_full_range():
    weight, stats = problem(2, 16, 32)
    weight[:, 5] *= 6  # an outlier stretches the range
    format = IntFormat(3, 32)
    full = rtn(weight, format, stats=stats, clip_ratios=(1.0,))
    found = learned_clipping(weight, stats, format, clip_ratios=(1.0,)).term
    assert squared(weight, found, stats) < 0.9 * squared(weight, full, stats)
    scale = found.scales(torch.float32)
    grid_values = rtn(weight, format, clip_ratios=(1.0,)).scales(torch.float32)
    assert bool((scale < grid_values).any())


def test_zero_steps_is_the_start_and_progress_is_told():
    weight, stats = problem(3, 6, 16)
    format = IntFormat(3, 8)
    assert torch.equal(autoround(weight, stats, format, steps=0, start="yaqa").term.codes,
                       yaqa(weight, stats, format).term.codes)  # fmt: skip
    told = []
    autoround(weight, stats, format, steps=40, progress=lambda *seen: told.append(seen))
    assert [step for step, _, _ in told] == list(range(2, 41, 2))
    assert {total for _, total, _ in told} == {40}
    losses = [loss for _, _, loss in told]
    assert losses == sorted(losses, reverse=True)


def test_deterministic():
    weight, stats = problem(4, 6, 16)
    one, other = (autoround(weight, stats, IntFormat(2, 8), steps=20).term for _ in range(2))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


def test_start_hands_on_its_notes():
    c = case(8, 4, 2, 8, 3)
    result = autoround(c.weight, c.stats, c.format, steps=2, start="yaqa")
    assert result.damping == 0.01
    assert result.fallbacks == ("no gradient moment G: rounded with feedback in H alone (gptq)",)


@pytest.mark.parametrize("method", [autoround, learned_clipping])
def test_obeys_the_laws_of_quantizers(method):
    check_quantizer(lambda w, s, f: method(w, s, f, steps=5).term, formats_of=entry_formats, max_examples=8)


def test_errors():
    weight, stats = problem(5, 4, 16)
    with pytest.raises(FormatError, match=r"autoround\(steps=-1, rate=1.0\) needs steps >= 0 and a rate above 0"):
        autoround(weight, stats, IntFormat(3, 8), steps=-1)
    with pytest.raises(FormatError, match=r"learned_clipping\(steps=100, rate=0\) needs"):
        learned_clipping(weight, stats, IntFormat(3, 8), rate=0)
    with pytest.raises(RecipeError, match="method='magic' is unknown"):
        autoround(weight, stats, IntFormat(3, 8), start="magic")
    with pytest.raises(StatsError, match="autoround needs calibration statistics"):
        autoround(weight, None, IntFormat(3, 8))
