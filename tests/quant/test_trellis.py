"""The trellis encoder against brute force, its certificate, and trellis-coded rtn and gptq."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import hessian_of

from tnc.decompose import QuantizeStage, decompose
from tnc.errors import FormatError, ShapeError
from tnc.formats import CODES, TrellisFormat
from tnc.metric import Metric
from tnc.quant import Grid, fit_grid, gptq, grid_lower_bound, refine, rtn, yaqa
from tnc.quant.feedback import feedback
from tnc.quant.rings import Rings, improve_rings
from tnc.quant.trellis import trellis_of
from tnc.quant.viterbi import Trellis, encode, least_costs
from tnc.stats import LayerStats
from tnc.testing import check_quantizer

FORMATS = {(2, 12): TrellisFormat(2), (3, 12): TrellisFormat(3), (4, 12): TrellisFormat(4)}


def ring_cost(levels, bits, codes, targets, weights):
    """Cost of one ring by the definition, in plain Python."""
    digits = (len(levels).bit_length() - 1) // bits
    total = 0.0
    for t in range(len(codes)):
        state = sum(codes[(t - i) % len(codes)] << bits * i for i in range(digits))
        total += float(weights[t]) * (float(targets[t]) - float(levels[state])) ** 2
    return total


def small(seed, bits, digits, length, count=2):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(1 << bits * digits, generator=generator)
    targets = torch.randn(length, count, generator=generator)
    weights = torch.rand(length, count, generator=generator) + 0.1
    return levels, Trellis.of(levels, bits), targets, weights


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from(((1, 3, 9), (1, 2, 5), (1, 4, 4), (2, 2, 4), (2, 3, 2), (3, 2, 1))))
def test_against_every_ring(seed, sizes):
    """Exhaustive up to D codes; beyond, never better than the best ring, rarely much worse, never below the bound."""
    bits, digits, length = sizes
    levels, trellis, targets, weights = small(seed, bits, digits, length)
    codes, bound = encode(trellis, targets, weights), least_costs(trellis, targets, weights)
    for b in range(targets.shape[1]):
        costs = [ring_cost(levels, bits, c, targets[:, b], weights[:, b])
                 for c in itertools.product(range(1 << bits), repeat=length)]  # fmt: skip
        found = ring_cost(levels, bits, codes[:, b].tolist(), targets[:, b], weights[:, b])
        assert found >= min(costs) * (1 - 1e-5)
        assert float(bound[b]) <= min(costs) * (1 + 1e-6)
        if length <= digits:
            assert found == pytest.approx(min(costs), rel=1e-4, abs=1e-5)
            assert float(bound[b]) == pytest.approx(min(costs), rel=1e-3, abs=1e-4)
        else:
            assert found <= sorted(costs)[len(costs) // 4]


def test_the_ring_is_near_the_open_optimum():
    levels, trellis, targets, weights = small(3, 2, 3, 96, count=24)
    codes = encode(trellis, targets, weights)
    found = [ring_cost(levels, 2, codes[:, b].tolist(), targets[:, b], weights[:, b]) for b in range(24)]
    bound = least_costs(trellis, targets, weights)
    assert sum(found) <= 1.03 * float(bound.sum()) and all(f >= b for f, b in zip(found, bound.tolist(), strict=True))


@pytest.mark.parametrize(("bits", "most"), [(2, 0.078), (3, 0.023), (4, 0.008)])
def test_gaussian_error_beats_every_scalar_quantizer(bits, most):
    """Lloyd-Max at 2, 3, 4 bits: 0.1175, 0.03454, 0.009497; the rate-distortion limit: 0.0625, 0.0156, 0.0039."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    format = FORMATS[bits, 12]
    gain = float(format.full_scale(torch.ones(1, 1, 1), torch.zeros(1, 1), torch.ones(1, 1)))
    codes = encode(trellis_of(format), x / gain, torch.ones_like(x))
    error = x - gain * format.decode(codes, None, torch.float32)
    assert 4.0**-bits < float(error.square().mean() / x.square().mean()) < most


def problem(rows=40, columns=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, 1, generator=generator) + 0.5)
    return weight, LayerStats.from_hessian(hessian_of(columns, 50, generator), tokens=50)


@pytest.mark.parametrize("length", [256, 17])
def test_gptq_lowers_the_error_and_equals_rtn_for_diagonal_h(length):
    weight, stats = problem()
    format = TrellisFormat(2, length=length, group_size=5)
    terms = {"gptq": gptq(weight, stats, format), "rtn": rtn(weight, format)}
    squared = {}
    for name, term in terms.items():
        error = weight.double() - term.to_dense().double()
        squared[name] = float(torch.einsum("ij,jk,ik->", error, stats.hessian, error))
        assert grid_lower_bound(weight, term, stats.hessian) <= squared[name]
        assert grid_lower_bound(weight, term, torch.ones(10)) <= float(error.square().sum())
    assert squared["gptq"] < 0.9 * squared["rtn"]
    plain = LayerStats.from_hessian(torch.eye(10), tokens=50)
    assert torch.equal(gptq(weight, plain, format).codes, rtn(weight, format).codes)


def test_columns_stand_alone_and_zero_rows_are_exact():
    weight, _ = problem()
    weight[3] = 0
    grid = fit_grid(weight, TrellisFormat(2))
    codes = grid.quantize(weight)
    index = torch.tensor([7, 2])
    assert torch.equal(grid.quantize(weight[:, index], index), codes[:, index])
    assert torch.equal(grid.dequantize(codes[:, index], index), grid.dequantize(codes)[:, index])
    dense = grid.term(codes).to_dense()
    assert torch.equal(dense, grid.dequantize(codes)) and not bool(dense[3].any())
    assert torch.equal(Grid.of(grid.term(codes)).scale, grid.scale)


@pytest.mark.parametrize("code", CODES)
def test_powers_of_two_pass_through(code):
    weight, _ = problem()
    once, larger = (rtn(weight * s, TrellisFormat(2, code=code)) for s in (1.0, 4.0))
    assert torch.equal(once.codes, larger.codes) and torch.equal(4 * once.scale, larger.scale)


def test_entries_of_a_sequence_are_not_rounded_one_by_one():
    weight, format = torch.randn(8, 16), TrellisFormat(2, state_bits=8)
    stats = LayerStats.from_hessian(torch.eye(16), torch.eye(8), tokens=9)
    for stage in (QuantizeStage(format, method="yaqa"), QuantizeStage(format, refine=1)):
        with pytest.raises(FormatError, match=r"codes whole columns.*use method='gptq' or 'rtn', or a format of anti"):
            decompose(weight, [stage], stats)
    grid = fit_grid(weight, TrellisFormat(2, state_bits=8, path="diagonal"))
    with pytest.raises(FormatError, match=r"codes anti-diagonals: columns are not rounded in turn"):
        grid.levels(torch.float32, torch.arange(16), 8).columns()
    with pytest.raises(ShapeError, match=r"columns of trellis2 L8 diagonal are not coded alone"):
        grid.quantize(weight[:, :2], torch.arange(2))


DIAGONAL = TrellisFormat(2, state_bits=8, path="diagonal", length=12, group_size=5)


def two_sided(rows=16, columns=10, seed=0):
    weight, stats = problem(rows, columns, seed)
    gradient = hessian_of(rows, 50, torch.Generator().manual_seed(seed + 1))
    return weight, LayerStats.from_hessian(stats.hessian, gradient, tokens=50)


@pytest.mark.parametrize("shape", [(16, 10), (5, 25), (1, 5), (9, 5)])
def test_every_line_is_coded_to_its_own_two_sided_target(shape):
    """With E at hand, line by line: the target is w + (Uᵀ E V) - E, nothing later comes into it, weights are pivots."""
    weight, stats = two_sided(*shape)
    rows, columns = shape
    term = yaqa(weight, stats, DIAGONAL, damping=0.01, gradient_damping=0.1).term
    left, right = (
        feedback(second, damping, order=torch.arange(len(second)), side=side)
        for second, damping, side in ((stats.gradient.second, 0.1, "G"), (stats.hessian, 0.01, "H"))
    )
    error = weight.double() - term.to_dense().double()
    own = left.factor.T @ error @ right.factor
    scale = term.scales(torch.float64).repeat_interleave(5, 1)
    target = (weight + own - error) / scale
    costs = torch.outer(left.pivots, right.pivots) * scale.square()
    for line in range(rows + columns - 1):
        entries = [(i, line - i) for i in range(rows) if 0 <= line - i < columns]
        for first, last in DIAGONAL.sequences(len(entries)):
            at = tuple(torch.tensor(each) for each in zip(*entries[first:last], strict=True))
            one = (target[at].float().unsqueeze(1), (costs[at] / costs[at].max()).float().unsqueeze(1))
            found = encode(trellis_of(DIAGONAL), *one)[:, 0]
            values = DIAGONAL.decode(term.integer_codes(), None, torch.float64)[at]
            chosen = float((one[1][:, 0] * (values - target[at]).square()).sum())
            best = ring_cost(CODES["1mad"](torch.arange(256)), 2, found.tolist(), *(each[:, 0] for each in one))
            assert chosen <= best * (1 + 1e-3) + 1e-6


def test_anti_diagonals_serve_rtn_gptq_and_yaqa_in_their_own_metrics():
    weight, stats = two_sided(40, 30)
    terms = {
        "rtn": rtn(weight, DIAGONAL), "gptq": gptq(weight, stats, DIAGONAL), "yaqa": yaqa(weight, stats, DIAGONAL).term,
    }  # fmt: skip
    errors = {name: weight.double() - term.to_dense().double() for name, term in terms.items()}
    in_h = {name: Metric.full(stats).squared_norm(e) for name, e in errors.items()}
    in_both = {name: Metric.fisher(stats).squared_norm(e) for name, e in errors.items()}
    assert in_h["gptq"] < 0.9 * in_h["rtn"] and in_both["yaqa"] < 0.9 * in_both["gptq"]
    better = refine(weight, terms["yaqa"], stats, sweeps=2)
    assert Metric.fisher(stats).squared_norm(weight.double() - better.to_dense().double()) < in_both["yaqa"]
    in_h_alone = LayerStats.from_hessian(stats.hessian, tokens=50)
    swept = refine(weight, terms["gptq"], in_h_alone, sweeps=2)
    assert Metric.full(stats).squared_norm(weight.double() - swept.to_dense().double()) < in_h["gptq"]
    assert torch.equal(yaqa(weight, in_h_alone, DIAGONAL).term.codes, terms["gptq"].codes)
    plain = LayerStats.from_hessian(torch.eye(30), tokens=50)
    assert torch.equal(gptq(weight, plain, DIAGONAL).codes, terms["rtn"].codes)
    identities = LayerStats.from_hessian(stats.hessian, torch.eye(40), tokens=50)
    assert torch.equal(yaqa(weight, identities, DIAGONAL).term.codes, terms["gptq"].codes)
    assert 0 < grid_lower_bound(weight, terms["rtn"], torch.ones(30)) <= float(errors["rtn"].square().sum())
    points = terms["rtn"].scales(torch.float64).repeat_interleave(5, 1).unsqueeze(-1) * CODES["1mad"](torch.arange(256))
    nearest = (weight.double().unsqueeze(-1) - points).abs().amin(-1).square().sum()
    assert grid_lower_bound(weight, terms["rtn"], torch.ones(30)) == pytest.approx(float(nearest), rel=1e-6)


@pytest.mark.parametrize("fisher", [True, False])
def test_a_sweep_over_lines_lowers_the_error_by_codes_alone(fisher):
    weight, stats = two_sided(40, 30, seed=3)
    term = rtn(weight, DIAGONAL)
    hessian, gradient = stats.hessian.float(), stats.gradient.second.float() if fisher else None
    down = torch.ones(40) if gradient is None else gradient.diagonal()
    rings = Rings.of(Grid.of(term), down, hessian.diagonal())
    better = improve_rings(weight, term, rings, hessian, gradient)
    metric = Metric(stats.hessian, stats.gradient.second if fisher else None)
    before, after = (metric.squared_norm(weight.double() - t.to_dense().double()) for t in (term, better))
    assert torch.equal(better.scale, term.scale) and after < 0.9 * before


def test_laws_of_anti_diagonals():
    def formats_of(columns):
        sizes = st.sampled_from([None, 1, columns])
        return st.builds(lambda g: TrellisFormat(2, 4, path="diagonal", length=9, group_size=g), sizes)

    check_quantizer(lambda w, s, f: yaqa(w, s, f).term, formats_of=formats_of, max_examples=10)
    check_quantizer(lambda w, s, f: refine(w, gptq(w, s, f), s, sweeps=1), formats_of=formats_of, max_examples=8)
