import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import case, hessian_of

from tnc.errors import FormatError, StatsError
from tnc.formats import IntFormat, TableFormat, number_format
from tnc.quant import fit_grid, gptq, rtn, yaqa
from tnc.stats import LayerStats
from tnc.testing import check_quantizer, entry_formats

FEW = settings(deadline=None, max_examples=20)


def two_sided(seed, rows, groups, group, bits, *, tokens=None, correlation=1.0, **options):
    """A case with a gradient moment of rank ``tokens``."""
    c = case(seed, rows, groups, group, bits, tokens=tokens, correlation=correlation, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    gradient = hessian_of(rows, tokens or 4 * rows, generator, correlation)
    c.stats = LayerStats.from_hessian(c.hessian, gradient, tokens=9)
    return c


def nats(c, term):
    """½ tr(Eᵀ G E H) straight from the definition, float64."""
    error = c.weight.double() - term.to_dense().double()
    return 0.5 * float(torch.einsum("ij,jk,lk,li->", error, c.hessian, error, c.stats.gradient.second))


def unit_upper(matrix, damping):
    """V of the damped matrix = V D Vᵀ by elimination of the last variable first, and the order of rounding."""
    n = len(matrix)
    order = sorted(range(n), key=lambda j: -float(matrix[j, j]))
    rest = (matrix + damping * matrix.diagonal().mean() * torch.eye(n, dtype=torch.float64))[order][:, order]
    unit = torch.eye(n, dtype=torch.float64)
    for j in reversed(range(n)):
        unit[: j + 1, j] = rest[: j + 1, j] / rest[j, j]
        rest = rest - rest[j, j] * torch.outer(unit[:, j], unit[:, j])
    return unit, order


def entry_by_entry(c, damping, gradient_damping):
    """Codes by the definition, one entry after another; checks that Uᵀ E V holds each entry's own rounding error."""
    grid = fit_grid(c.weight, c.format, importance=c.hessian.diagonal())
    right, across = unit_upper(c.hessian, damping)
    upper, down = unit_upper(c.stats.gradient.second, gradient_damping)
    weight, error = c.weight.double()[down][:, across], torch.zeros(c.weight.shape, dtype=torch.float64)
    codes, own = torch.empty(c.weight.shape, dtype=torch.uint8), torch.zeros_like(error)
    for a, i in enumerate(down):
        for b, j in enumerate(across):
            target = weight[a, b] + upper[:, a] @ error @ right[:, b]
            column = torch.zeros(len(down), 1, dtype=torch.float64)
            column[i] = target
            index = torch.tensor([j])
            code = grid.quantize(column, index)
            codes[i, j] = code[i, 0]
            value = grid.dequantize(code, index, torch.float64)[i, 0]
            error[a, b], own[a, b] = weight[a, b] - value, target - value
    assert torch.allclose(upper.T @ error @ right, own, atol=1e-10 * float(weight.abs().max()))
    return codes


@given(st.integers(0, 2**20), st.sampled_from((1, 2, 3, 7)), st.integers(1, 3), st.sampled_from((1, 2, 5)),
       st.sampled_from((2, 3, 4)), st.sampled_from((1, 2, 3, 32)), st.sampled_from((3, 40)))  # fmt: skip
@FEW
def test_equals_the_definition(seed, rows, groups, group, bits, tile, tokens):
    c = two_sided(seed, rows, groups, group, bits, tokens=tokens)
    codes = yaqa(c.weight, c.stats, c.format, damping=0.02, gradient_damping=0.05, tile=tile).term.integer_codes()
    assert torch.equal(codes, entry_by_entry(c, 0.02, 0.05))


@given(st.integers(0, 2**20), st.sampled_from((1, 5, 33)), st.sampled_from((2, 3, 4)), st.sampled_from((1, 7, 32)))
@FEW
def test_equals_gptq_where_g_is_the_identity(seed, rows, bits, tile):
    c = case(seed, rows, 3, 13, bits)
    stats = LayerStats.from_hessian(c.hessian, torch.eye(rows) * 0.25, tokens=9)
    assert torch.equal(yaqa(c.weight, stats, c.format, tile=tile).term.codes, gptq(c.weight, c.stats, c.format).codes)


def test_equals_rtn_for_diagonal_statistics():
    c = case(0, 9, 2, 8, 3)
    stats = LayerStats.from_hessian(torch.diag(torch.rand(16)), torch.diag(torch.rand(9)), tokens=9)
    assert torch.equal(yaqa(c.weight, stats, c.format).term.codes, rtn(c.weight, c.format, stats=stats).codes)


def test_of_the_transposed_weight_is_transposed():
    # one scale for the whole weight: rows and columns have the same part in ``tr(Eᵀ G E H)``
    c = two_sided(3, 24, 1, 20, 4)
    turned = LayerStats.from_hessian(c.stats.gradient.second, c.hessian, tokens=9)
    format = number_format("fp8_e4m3_tensor")
    options = {"damping": 0.01, "gradient_damping": 0.01, "clip_ratios": (1.0,)}
    one = yaqa(c.weight, c.stats, format, **options).term.integer_codes()
    assert torch.equal(one, yaqa(c.weight.T, turned, format, **options).term.integer_codes().T)


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.9), (3, 0.85), (4, 0.85)])
def test_fewer_nats_than_gptq_on_average(bits, limit):
    ratios = []
    for seed in range(8):
        c = two_sided(seed, 24, 2, 16, bits, tokens=200)
        ratios.append(nats(c, yaqa(c.weight, c.stats, c.format).term) / nats(c, gptq(c.weight, c.stats, c.format)))
    assert sum(ratios) / len(ratios) < limit  # measured 0.66, 0.60, 0.60


@pytest.mark.parametrize("format", [
    IntFormat(2, 8), IntFormat(4, None, True), number_format("nf4", group_size=8), TableFormat("e2m1", 8, scale="e8m0"),
    number_format("fp8_e4m3_tensor"),
])  # fmt: skip
def test_every_format_goes_through(format):
    c = two_sided(1, 12, 2, 8, 3, tokens=100)
    term = yaqa(c.weight, c.stats, format).term
    nearest = rtn(c.weight, format, stats=c.stats)
    assert term.format == format
    assert nats(c, term) < nats(c, nearest)


def test_obeys_the_laws_of_quantizers():
    check_quantizer(lambda w, s, f: yaqa(w, s, f, tile=4).term, max_examples=15, formats_of=entry_formats)


def test_dead_rows_and_columns_are_rounded_to_nearest():
    c = two_sided(5, 6, 2, 8, 3)
    hessian, gradient = c.hessian.clone(), c.stats.gradient.second.clone()
    hessian[3], hessian[:, 3] = 0, 0
    gradient[2], gradient[:, 2] = 0, 0
    stats = LayerStats.from_hessian(hessian, gradient, tokens=9)
    result = yaqa(c.weight, stats, c.format)
    assert torch.equal(result.term.integer_codes()[:, 3], rtn(c.weight, c.format, stats=stats).integer_codes()[:, 3])
    # a dead row gets no feedback from other rows: it is rounded in H alone
    assert torch.equal(result.term.integer_codes()[2], gptq(c.weight, stats, c.format).integer_codes()[2])
    assert result.fallbacks == (
        "1 of 16 columns are dead (H_jj = 0): rounded to nearest",
        "1 of 6 rows are dead (G_ii = 0): rounded to nearest",
    )


def test_damping_of_both_sides():
    c = two_sided(6, 8, 2, 8, 3, tokens=3)
    result = yaqa(c.weight, c.stats, c.format, damping=0.0, gradient_damping=0.0)
    assert result.damping == 1e-6
    assert result.fallbacks == tuple(
        f"damping raised from 0 to 1e-06: the damped {side} was not positive definite" for side in "HG"
    )
    far = yaqa(c.weight, c.stats, c.format, damping=1e9, gradient_damping=1e9).term
    assert torch.equal(far.codes, rtn(c.weight, c.format, stats=c.stats).codes)


def test_without_gradients_it_is_gptq_and_says_so():
    c = case(2, 4, 2, 8, 3)
    result = yaqa(c.weight, c.stats, c.format)
    assert torch.equal(result.term.codes, gptq(c.weight, c.stats, c.format).codes)
    assert result.fallbacks == ("no gradient moment G: rounded with feedback in H alone (gptq)",)


def test_errors():
    c = two_sided(2, 4, 2, 8, 3)
    with pytest.raises(FormatError, match=r"yaqa\(tile=0\) must be at least 1; the default is 32"):
        yaqa(c.weight, c.stats, c.format, tile=0)
    with pytest.raises(StatsError, match=r"yaqa needs calibration statistics"):
        yaqa(c.weight, None, c.format)
    with pytest.raises(StatsError, match=r"damping=-1.0 must be"):
        yaqa(c.weight, c.stats, c.format, gradient_damping=-1.0)
