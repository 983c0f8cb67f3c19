import pytest
import torch

from tnc.errors import FormatError
from tnc.formats import IntFormat, TableFormat, number_format
from tnc.quant import hqq, rtn
from tnc.quant.clip import fit_grid
from tnc.quant.hqq import _refit, _shrink
from tnc.testing import check_quantizer, entry_formats


def loss(weight, term, power):
    return float((weight - term.to_dense()).abs().pow(power).sum())


def heavy_tailed(seed, rows=16, columns=64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight + 4 * weight**3 * (torch.rand(rows, columns, generator=generator) < 0.03)


@pytest.mark.parametrize(("power", "beta"), [(0.7, 10.0), (0.5, 2.0), (1.0, 1.0)])
def test_shrink_is_a_step_of_the_proximal_map(power, beta):
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    found = _shrink(x, power, beta)
    assert torch.equal(found, -_shrink(-x, power, beta))
    assert bool((found.abs() <= x.abs()).all())
    assert float(_shrink(torch.zeros(1), power, beta)) == 0
    if power == 1.0:  # exact: soft thresholding
        expected = x.sign() * (x.abs() - 1 / beta).clamp_min(0)
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("format", [
    IntFormat(2, 16), IntFormat(4, 32, True), number_format("nf4", group_size=16),
    TableFormat("e2m1", 16, scale="e8m0"),
])  # fmt: skip
def test_smaller_p_norm_than_its_first_grid(format):
    for seed in range(3):
        weight = heavy_tailed(seed)
        first, found = rtn(weight, format), hqq(weight, None, format).term
        assert found.format == format
        assert loss(weight, found, 0.7) <= loss(weight, first, 0.7) * (1 + 1e-6)
    assert torch.equal(hqq(weight, None, format, iterations=0).term.codes, first.codes)


def test_gains_over_the_full_range_as_published():
    ratios = []
    for seed in range(4):
        weight = heavy_tailed(seed)
        first = rtn(weight, IntFormat(3, 64), clip_ratios=(1.0,))
        ratios.append(loss(weight, hqq(weight, None, IntFormat(3, 64), clip_ratios=(1.0,)).term, 0.7)
                      / loss(weight, first, 0.7))  # fmt: skip
    assert sum(ratios) / len(ratios) < 0.95


def test_zero_points_and_scales_are_least_squares_where_nothing_is_shrunk():
    weight = heavy_tailed(0, 4, 16)
    format = IntFormat(3, 16)
    grid = fit_grid(weight, format, clip_ratios=(1.0,))
    codes = grid.quantize(weight)
    refitted = _refit(weight, grid, format.layout((4, 16)), 0.7, 1e-9)
    scaled = weight / grid.scale.float()
    for row in range(4):
        errors = [float((codes[row].float() - zero - scaled[row]).square().sum()) for zero in range(8)]
        zero = errors.index(min(errors))
        assert int(refitted.zero[row, 0]) == zero
        levels = codes[row].float() - zero
        best = float((levels @ weight[row]) / (levels @ levels))
        assert float(refitted.scale[row, 0]) == pytest.approx(best, rel=2**-10)


def test_obeys_the_laws_of_quantizers():
    check_quantizer(
        lambda w, s, f: hqq(w, s, f, iterations=5).term, nearest=True, formats_of=entry_formats, max_examples=12
    )


def test_errors():
    for options in ({"power": 0.0}, {"power": 1.5}, {"beta": 0.0}, {"iterations": -1}):
        with pytest.raises(FormatError, match="needs 0 < power <= 1, beta > 0, iterations >= 0"):
            hqq(torch.ones(2, 8), None, IntFormat(3, 8), **options)
