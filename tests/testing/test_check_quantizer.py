"""`check_quantizer`: rtn and gptq obey the laws, and each broken quantizer is caught by name."""

import dataclasses

import pytest
import torch

from tnc.errors import LawError
from tnc.formats import IntFormat, pack, packed_length
from tnc.quant import gptq, rtn
from tnc.terms import Diagonal, Product, Quantized
from tnc.testing import check_quantizer, int_formats, weighted_problems

LAWS = (
    "shape_is_kept", "codes_are_in_range", "values_are_finite", "inputs_are_unchanged",
    "storage_is_what_the_format_says", "zero_gives_zero", "zero_columns_stay_zero", "no_worse_than_zero",
    "values_scale_with_the_weight", "nonfinite_is_refused",
)  # fmt: skip

PLAIN = (1.0,)


def nearest(weight, stats, format):
    return rtn(weight, format, stats=stats, clip_ratios=PLAIN)


def test_rtn_rounds_to_the_nearest_code():
    def quantizer(weight, stats, format):
        return rtn(weight, format, stats=stats)

    assert check_quantizer(quantizer, nearest=True, max_examples=12) == (*LAWS, "codes_are_nearest")
    check_quantizer(nearest, nearest=True, max_examples=12)


def test_gptq():
    assert check_quantizer(gptq, max_examples=12) == LAWS


def test_quantized_leaves_of_a_product_are_checked():
    def scaled(weight, stats, format):
        return Product((nearest(weight, stats, format), Diagonal(torch.ones(weight.shape[1]))))

    check_quantizer(scaled, max_examples=10)


def recoded(change):
    """Nearest codes changed: change(codes, weight, format) gives the codes that are stored."""

    def quantizer(weight, stats, format):
        term = nearest(weight, stats, format)
        codes = change(term.integer_codes().to(torch.int64), weight, format)
        return dataclasses.replace(term, codes=pack(codes.clamp(0, format.levels - 1), format.bits))

    return quantizer


def restored(**change):
    """The nearest term with stored tensors changed: name=function(tensor, term)."""

    def quantizer(weight, stats, format):
        term = nearest(weight, stats, format)
        return dataclasses.replace(term, **{k: f(getattr(term, k), term) for k, f in change.items()})

    return quantizer


def transposed(weight, stats, format):
    return nearest(weight.T.contiguous(), stats, IntFormat(format.bits, None, format.symmetric))


def out_of_range(weight, stats, format):
    term = nearest(weight, stats, format)
    return Quantized.from_codes(term.integer_codes().long() + 1, term.scale, term.zeros().long(), format)


def dirty_padding(codes, term):
    spare = 8 * packed_length(term.shape[1], term.format.bits) - term.shape[1] * term.format.bits
    codes = codes.clone()
    if spare:
        codes[:, -1] |= 128
    return codes


def in_place(weight, stats, format):
    term = nearest(weight, stats, format)
    weight.clamp_(-0.5, 0.5)
    return term


def damps_the_hessian(weight, stats, format):
    term = nearest(weight, stats, format)
    stats.hessian.diagonal().add_(1.0)
    return term


def always_eight_bits(weight, stats, format):
    return nearest(weight, stats, IntFormat(8, format.group_size, format.symmetric))


def whole_rows(weight, stats, format):
    return nearest(weight, stats, IntFormat(format.bits, None, format.symmetric))


def repairs_nan(weight, stats, format):
    return nearest(weight.nan_to_num(), stats, format)


def negated(weight, stats, format):
    return nearest(-weight, stats, format)


def zero_point(weight, format):
    return nearest(weight, None, format).zeros().repeat_interleave(format.group_of(weight.shape[1]), 1)


def one_code_up_at_zeros(codes, weight, format):
    up = torch.where(codes + 1 < format.levels, codes + 1, codes - 1)
    return torch.where(weight == 0, up, codes) if weight.any() else codes


def drop_small(codes, weight, format):
    return torch.where(weight.abs() < 0.5, zero_point(weight, format).long(), codes)


def towards_zero(codes, weight, format):
    zero = zero_point(weight, format).long()
    return codes - (codes - zero).sign()


SMALL = weighted_problems(
    (3, 6), spectra=("flat", "power"), dtypes=(torch.float32,), scales=(1.0, 1e2), hessians=("full",),
    metrics=("full",),
)  # fmt: skip

BROKEN = {
    "transposed": (transposed, "shape_is_kept"),
    "dense result": (lambda *args: nearest(*args).to_dense(), "shape_is_kept"),
    "pack refuses": (out_of_range, r"shape_is_kept: raised FormatError: pack\(bits=2\) got codes in"),
    "wide codes": (restored(codes=lambda t, _: t.to(torch.int16) + 300), "codes_are_in_range"),
    "dirty padding": (restored(codes=dirty_padding), "codes_are_in_range"),
    "wide zeros": (restored(zero=lambda t, _: t if t is None else t.long()), "codes_are_in_range"),
    "infinite scale": (restored(scale=lambda t, _: 1 / (t - t)), "values_are_finite"),
    "weight in place": (in_place, "inputs_are_unchanged"),
    "hessian in place": (damps_the_hessian, "inputs_are_unchanged"),
    "wide scale": (restored(scale=lambda t, _: t.float()), "storage_is_what_the_format_says"),
    "always 8 bits": (always_eight_bits, "storage_is_what_the_format_says"),
    "ignores groups": (whole_rows, "storage_is_what_the_format_says"),
    "scale 1 and code 0": (
        restored(scale=lambda t, _: t + 1, codes=lambda t, _: t * 0),
        "zero_gives_zero",
    ),
    "zeros move": (recoded(one_code_up_at_zeros), "zero_columns_stay_zero"),
    "sign flipped": (negated, "no_worse_than_zero"),
    "scale doubled": (restored(scale=lambda t, _: 4 * t), "no_worse_than_zero"),
    "absolute threshold": (recoded(drop_small), "values_scale_with_the_weight"),
    "NaN repaired": (repairs_nan, "nonfinite_is_refused"),
}


@pytest.mark.parametrize(("quantizer", "law"), BROKEN.values(), ids=BROKEN)
def test_a_broken_quantizer_is_caught_by_its_law(quantizer, law):
    with pytest.raises(LawError, match=f"^{law}") as caught:
        check_quantizer(quantizer, problems=SMALL, formats_of=int_formats, max_examples=15)
    assert "Smallest failing case: IntFormat(bits=" in str(caught.value)
    assert "quantizer(problem.weight, problem.stats, tnc.IntFormat(" in str(caught.value)


def test_rounding_towards_zero_is_not_nearest():
    check_quantizer(recoded(towards_zero), problems=SMALL, formats_of=int_formats, max_examples=10)
    with pytest.raises(LawError, match=r"^codes_are_nearest: expected the nearest point"):
        check_quantizer(recoded(towards_zero), nearest=True, problems=SMALL, formats_of=int_formats, max_examples=10)


def test_gptq_is_not_nearest():
    problems = weighted_problems((3, 6), hessians=("full",), spectra=("flat",))
    with pytest.raises(LawError, match=r"^codes_are_nearest"):
        check_quantizer(gptq, nearest=True, problems=problems, formats_of=int_formats, max_examples=6)
