import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import DTYPES, case, cases

from tnc.errors import FormatError, ShapeError
from tnc.formats import IntFormat
from tnc.quant import CLIP_RATIOS, Grid, fit_grid, rtn

SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)
FEW = settings(deadline=None, max_examples=40)


def spread(tensor, columns):
    """(m, groups) to (m, n)."""
    return tensor.double().repeat_interleave(columns // tensor.shape[1], dim=1)


def test_a_range_that_fits_is_exact():
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [0.5, 0.0, 1.0, 1.5]])
    grid = fit_grid(weight, IntFormat(2))
    assert grid.scale.tolist() == [[1.0], [0.5]]
    assert grid.zero.tolist() == [[1], [0]]
    assert grid.quantize(weight).tolist() == [[0, 1, 2, 3], [1, 0, 2, 3]]
    assert torch.equal(grid.dequantize(grid.quantize(weight)), weight)


def test_symmetric_uses_the_lowest_code_and_represents_both_ends():
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [-2.0, 0.0, 0.0, 3.0]])
    grid = fit_grid(weight, IntFormat(2, symmetric=True), clip_ratios=(1.0,))
    assert grid.scale.tolist() == [[1.0], [3.0]]
    assert grid.zero.tolist() == [[2], [2]]
    assert grid.dequantize(grid.quantize(weight)).tolist() == [[-2, -1, 0, 1], [-3, 0, 0, 3]]


@given(cases(dtypes=DTYPES[:3], scales=SCALES))
@FEW
def test_unclipped_error_is_at_most_half_a_scale(c):
    grid = fit_grid(c.weight, c.format, clip_ratios=(1.0,))
    error = (c.weight.double() - grid.dequantize(grid.quantize(c.weight), dtype=torch.float64)).abs()
    rounding = torch.finfo(grid.scale.dtype).eps * c.format.levels / 2  # of the scale, seen at the range's ends
    assert bool((error <= spread(grid.scale, c.weight.shape[1]) * (0.5 + rounding + 1e-4)).all())


@given(cases(dtypes=DTYPES, scales=(1e-3, 1.0, 1e3)))
@FEW
def test_no_code_is_nearer_than_the_chosen_one(c):
    grid = fit_grid(c.weight, c.format)
    weight, n = c.weight.double(), c.weight.shape[1]
    values = torch.arange(c.format.levels).view(-1, 1, 1).double() - spread(grid.zero, n)
    distance = (weight - values * spread(grid.scale, n)).abs()  # (levels, m, n)
    chosen = distance.gather(0, grid.quantize(c.weight).long().unsqueeze(0))[0]
    slack = 1e-5 * c.format.levels * spread(grid.scale, n)  # float32 division
    assert bool((chosen <= distance.amin(0) + slack).all())


@given(cases(scales=(1e-2, 1.0)), st.booleans())
@FEW
def test_clip_search_equals_brute_force_group_by_group(c, weighted):
    importance = c.hessian.diagonal() if weighted else torch.ones(c.weight.shape[1]).double()
    grid = fit_grid(c.weight, c.format, importance=importance if weighted else None)
    single = [fit_grid(c.weight, c.format, clip_ratios=(ratio,)) for ratio in CLIP_RATIOS]

    def error(g):
        e = importance * (c.weight - g.dequantize(g.quantize(c.weight), dtype=torch.float64)) ** 2
        return e.reshape(*g.scale.shape, -1).sum(-1)

    least = torch.stack([error(g) for g in single]).amin(0)
    assert torch.allclose(error(grid), least, rtol=1e-9, atol=1e-12 * float(least.max()))
    assert bool((error(grid) <= error(single[0]) * (1 + 1e-12)).all())


def test_clip_search_has_no_unit():
    c = case(1, 4, 2, 16, 3, dtype=torch.float32)
    diagonal = c.hessian.diagonal()
    one = fit_grid(c.weight * 2.0**-60, c.format, importance=diagonal)
    other = fit_grid(c.weight * 2.0**-100, c.format, importance=diagonal * 1e-60)  # squares leave float32
    assert torch.equal(one.scale * 2.0**-40, other.scale)
    assert not torch.equal(one.scale, fit_grid(c.weight * 2.0**-60, c.format, clip_ratios=(1.0,)).scale)


def test_clip_search_in_parts_is_the_same(monkeypatch):
    c = case(0, 7, 3, 8, 3)
    whole = fit_grid(c.weight, c.format)
    monkeypatch.setattr("tnc.quant.clip._CHUNK", 48)  # two rows a part
    parts = fit_grid(c.weight, c.format)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.zero, whole.zero)


def test_clip_search_follows_the_importance():
    weight = torch.tensor([[1.0, 0.35, 0.35, 0.35]])
    spared = fit_grid(weight, IntFormat(2), importance=torch.tensor([0.0, 1, 1, 1]))
    kept = fit_grid(weight, IntFormat(2), importance=torch.tensor([1.0, 0, 0, 0]))
    assert float(spared.scale) < 0.34 > float(kept.scale) * 0.99
    assert abs(float(kept.scale) - 1 / 3) < 1e-3


@pytest.mark.parametrize(("size", "ratio"), [(3e5, 0.6), (2e-3, 0.6), (7.0, 0.8)])
def test_a_ratio_shrinks_the_range(size, ratio):
    weight = torch.tensor([[-size, 2 * size, 0.0]])
    grid = fit_grid(weight, IntFormat(8), clip_ratios=(ratio,))
    full = fit_grid(weight, IntFormat(8), clip_ratios=(1.0,))
    assert torch.allclose(grid.scale.double(), ratio * full.scale.double(), rtol=2e-2)
    assert torch.equal(grid.zero, full.zero)
    assert torch.allclose(full.scale.double(), torch.full((1, 1), 3 * size / 255).double(), rtol=5e-3)


@pytest.mark.parametrize(
    ("scale", "stored"),
    [(1e-9, torch.bfloat16), (1e-2, torch.float16), (1e3, torch.float16), (1e8, torch.bfloat16)],
)
def test_scales_are_float16_where_it_is_normal(scale, stored):
    grid = fit_grid(case(0, 4, 2, 16, 4, scale=scale).weight, IntFormat(4, 16))
    assert grid.scale.dtype == stored
    assert bool((grid.scale.double() >= torch.finfo(stored).tiny).all())


def test_clipped_scales_stay_normal_in_float16():
    tiny = torch.finfo(torch.float16).tiny
    weight = torch.tensor([[3 * tiny, 1.3 * tiny, 1.3 * tiny, 1.3 * tiny]])
    grid = fit_grid(weight, IntFormat(2), clip_ratios=(0.6,))
    assert grid.scale.dtype == torch.float16
    assert float(grid.scale) == tiny


def test_tiny_and_huge_float_ranges():
    for value in (1e-45, 1e-38, 3e38):
        weight = torch.tensor([[value, -value]])
        dense = rtn(weight, IntFormat(8)).to_dense()
        assert bool(torch.isfinite(dense).all())
        assert float((dense - weight).abs().max()) <= max(value / 100, 0.6e-38)  # half the least scale


@given(st.integers(0, 99), st.sampled_from((2, 3, 4, 8)), st.booleans(), st.integers(-4, 4))
@FEW
def test_powers_of_two_pass_through(seed, bits, symmetric, power):
    c = case(seed, 3, 3, 8, bits, symmetric=symmetric, dtype=torch.float32)
    one, other = (fit_grid(c.weight * s, c.format) for s in (1.0, 2.0**power))
    assert torch.equal(one.scale * 2.0**power, other.scale)
    assert torch.equal(one.zero, other.zero)
    assert torch.equal(one.quantize(c.weight), other.quantize(c.weight * 2.0**power))


@given(cases(dtypes=DTYPES, scales=SCALES[:4]))
@FEW
def test_zero_weights_are_exact(c):
    weight = c.weight.clone()
    weight[:, ::2] = 0
    dense = rtn(weight, c.format).to_dense()
    assert float(dense[:, ::2].abs().max()) == 0.0
    assert bool(torch.isfinite(dense).all())


def test_zero_groups_have_scale_zero():
    weight = torch.zeros(2, 8)
    weight[1, 4:] = 1.0
    grid = fit_grid(weight, IntFormat(3, 4))
    assert grid.scale[0].tolist() == [0, 0]
    assert grid.scale[1, 0] == 0
    codes = grid.quantize(torch.full((2, 8), 5.0))  # whatever is asked of it
    assert codes[0].tolist() == [0] * 8
    assert float(grid.dequantize(codes)[0].abs().max()) == 0.0


@pytest.mark.parametrize("value", [-3.0, 0.7, 100.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_rows_are_kept(value, symmetric):
    weight = torch.full((2, 6), value)
    dense = rtn(weight, IntFormat(4, symmetric=symmetric)).to_dense()
    assert torch.allclose(dense, weight, rtol=1e-3)  # float16 scale


@given(cases(), st.data())
@FEW
def test_columns_by_index_agree_with_the_whole(c, data):
    grid = fit_grid(c.weight, c.format)
    n = c.weight.shape[1]
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True)))
    codes = grid.quantize(c.weight)
    assert codes.dtype == torch.uint8
    assert torch.equal(grid.quantize(c.weight[:, index], index), codes[:, index])
    assert torch.equal(grid.dequantize(codes[:, index], index), grid.dequantize(codes)[:, index])


@given(cases(dtypes=DTYPES))
@FEW
def test_the_term_on_a_grid_is_that_grid(c):
    grid = fit_grid(c.weight, c.format)
    term = rtn(c.weight, c.format)
    again = Grid.of(term)
    assert torch.equal(again.scale, grid.scale)
    assert torch.equal(again.zero, grid.zero)
    assert again.zero.dtype == torch.uint8
    assert torch.equal(term.to_dense(), grid.dequantize(grid.quantize(c.weight)))


def test_columns_of_another_grid():
    grid = fit_grid(torch.ones(2, 8), IntFormat(4, 4))
    with pytest.raises(ShapeError, match=r"columns have shape \(2, 7\); expected \(2, 8\).*2 groups"):
        grid.quantize(torch.ones(2, 7))
    with pytest.raises(ShapeError, match=r"expected \(2, 1\).*Pass the matching index"):
        grid.dequantize(torch.ones(2, 7), torch.tensor([0]))
    with pytest.raises(ShapeError, match=r"shape \(3, 5\); expected \(2, 5\)"):
        fit_grid(torch.ones(2, 8), IntFormat(4)).quantize(torch.ones(3, 5))


@pytest.mark.parametrize("ratios", [(), (1.0, 0.0), (1.1,), (float("nan"),)])
def test_ratios_out_of_range(ratios):
    with pytest.raises(FormatError, match=r"clip_ratios=.*0 < ratio <= 1; use"):
        fit_grid(torch.ones(2, 8), IntFormat(4), clip_ratios=ratios)


def test_a_weight_beyond_bfloat16():
    with pytest.raises(FormatError, match=r"scale of .*above the largest bfloat16 3.39e\+38; divide"):
        fit_grid(torch.full((1, 2), 1e300, dtype=torch.float64), IntFormat(4))
