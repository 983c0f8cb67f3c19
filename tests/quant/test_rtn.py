import pytest
import torch
from hypothesis import given, settings
from quant_cases import DTYPES, case, cases

from tnc.errors import FormatError, NonFiniteError, ShapeError, StatsError
from tnc.formats import IntFormat
from tnc.quant import fit_grid, gptq, rtn
from tnc.terms import from_spec

FEW = settings(deadline=None, max_examples=40)


@given(cases(dtypes=DTYPES))
@FEW
def test_codes_survive_packing(c):
    term = rtn(c.weight, c.format, stats=c.stats)
    grid = fit_grid(c.weight, c.format, importance=c.hessian.diagonal())
    assert torch.equal(term.integer_codes(), grid.quantize(c.weight))
    assert torch.equal(term.zeros().to(torch.uint8), grid.zero)
    assert (term.zero is None) == c.format.symmetric
    assert torch.equal(from_spec(term.spec(), term.tensors()).to_dense(), term.to_dense())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_agrees_with_torch_fake_quantization(bits, symmetric):
    weight = case(bits, 6, 1, 40, bits, dtype=torch.float32).weight
    term = rtn(weight, IntFormat(bits, symmetric=symmetric))
    scale, zero = term.scale[:, 0].float(), term.zeros()[:, 0].to(torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, 0, 2**bits - 1)
    assert torch.allclose(term.to_dense(), expected, atol=1e-6)


@pytest.mark.parametrize(("symmetric", "bits"), [(False, 4.3125), (True, 4.25)])
def test_bits_per_weight(symmetric, bits):
    term = rtn(torch.randn(16, 512), IntFormat(4, 64, symmetric))
    assert term.storage_bits / (16 * 512) == bits


def test_clip_search_lowers_the_weighted_error():
    gains = []
    for seed in range(8):
        c = case(seed, 8, 4, 64, 3)
        plain, searched, weighted = rtn(c.weight, c.format, clip_ratios=(1.0,)), rtn(c.weight, c.format), None
        weighted = rtn(c.weight, c.format, stats=c.stats)

        def error(term, c=c):
            e = c.weight - term.to_dense().double()
            return float((e**2 @ c.hessian.diagonal()).sum()), float((e**2).sum())

        assert error(searched)[1] <= error(plain)[1]
        assert error(weighted)[0] <= min(error(plain)[0], error(searched)[0])
        gains.append(error(weighted)[0] / error(plain)[0])
    assert sum(gains) / len(gains) < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_bits_less_error(dtype):
    weight = case(3, 8, 2, 32, 4, dtype=dtype).weight
    errors = [float((weight.float() - rtn(weight, IntFormat(b, 32)).to_dense()).norm()) for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(weight.float().norm())


def test_outlier_column_keeps_to_its_group():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    spoiled = weight.clone()
    spoiled[:, 3] = 1e4
    a, b = (rtn(w, IntFormat(4, 8)).to_dense() for w in (weight, spoiled))
    assert torch.equal(a[:, 8:], b[:, 8:])
    assert torch.allclose(b[:, 3], spoiled[:, 3], rtol=2e-3)


def test_inputs_unchanged():
    c = case(0, 3, 2, 8, 2)
    weight, hessian = c.weight.clone(), c.hessian.clone()
    rtn(c.weight, c.format, stats=c.stats)
    assert torch.equal(c.weight, weight)
    assert torch.equal(c.hessian, hessian)


def test_views_are_accepted():
    weight = torch.randn(16, 24).T
    assert torch.equal(rtn(weight, IntFormat(4, 8)).to_dense(), rtn(weight.contiguous(), IntFormat(4, 8)).to_dense())


QUANTIZERS = [lambda w, f, s: rtn(w, f, stats=s), lambda w, f, s: gptq(w, s, f)]


@pytest.mark.parametrize("quantize", QUANTIZERS, ids=["rtn", "gptq"])
class TestBadInput:
    stats = case(0, 2, 2, 4, 4).stats

    def test_nan(self, quantize):
        weight = torch.ones(2, 8)
        weight[1, 2] = float("nan")
        with pytest.raises(NonFiniteError, match=r"weight holds 1 NaN or Inf of 16.*\(1, 2\)"):
            quantize(weight, IntFormat(4), self.stats)

    @pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
    def test_empty(self, quantize, shape):
        with pytest.raises(ShapeError, match=r"which holds no entries; expected at least one row"):
            quantize(torch.ones(shape), IntFormat(4), self.stats)

    def test_not_a_matrix(self, quantize):
        with pytest.raises(ShapeError, match="expected a floating-point matrix"):
            quantize(torch.ones(8), IntFormat(4), self.stats)

    def test_group_size(self, quantize):
        with pytest.raises(FormatError, match="group_size=3 does not divide in_features=8"):
            quantize(torch.ones(2, 8), IntFormat(4, 3), self.stats)

    def test_not_a_format(self, quantize):
        with pytest.raises(FormatError, match=r"format is 4; expected a number format such as tnc.IntFormat"):
            quantize(torch.ones(2, 8), 4, self.stats)

    def test_statistics_of_another_layer(self, quantize):
        with pytest.raises(StatsError, match="in_features=8; the weight has shape"):
            quantize(torch.ones(2, 6), IntFormat(4), self.stats)
