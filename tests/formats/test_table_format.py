"""Tables, names and specs of formats, against torch's small floats, the normal quantiles and hand-made cases."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from tnc.errors import FormatError
from tnc.formats import (
    FORMATS,
    SCALES,
    TABLES,
    IntFormat,
    TableFormat,
    format_from_spec,
    number_format,
    pack_ternary,
    register_format,
    unpack_ternary,
)  # fmt: skip
from tnc.testing import formats

# QLoRA (arXiv:2305.14314), appendix E, as printed there
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def normal_float(bits):
    """Quantiles of the normal distribution, 2**(bits - 1) of them positive, scaled to 1 (QLoRA, equation 4)."""
    levels = 2**bits
    last = 1 - (1 / (2 * levels) + 1 / (2 * (levels - 1))) / 2
    above = norm.ppf(np.linspace(last, 0.5, levels // 2 + 1)[:-1])
    below = -norm.ppf(np.linspace(last, 0.5, levels // 2)[:-1])
    values = np.sort([*below, 0.0, *above])
    return values / values.max()


def test_normal_floats_are_the_published_table_and_the_quantiles():
    assert TABLES["nf4"] == NF4
    np.testing.assert_allclose(normal_float(4), NF4, atol=1e-6)
    np.testing.assert_allclose(normal_float(3), TABLES["nf3"], atol=1e-7)


@pytest.mark.parametrize(("table", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_codes_are_the_bytes_of_torch(table, dtype):
    every = torch.arange(256, dtype=torch.uint8)
    expected = every.view(dtype).float()
    decoded = TableFormat(table).decode(every, None, torch.float32)
    finite = torch.isfinite(expected)
    assert torch.equal(decoded[finite], expected[finite])
    assert bool(torch.isnan(decoded[~finite]).all())


def test_four_bit_codes_are_sign_exponent_and_mantissa():
    for code, value in enumerate(TABLES["e2m1"]):  # OCP MX 1.0: bias 1, subnormals at exponent 0
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert value == (-1) ** sign * magnitude


def test_four_bit_bytes_are_those_of_torch():
    """torch.float4_e2m1fn_x2 keeps two codes a byte, the first in the low half, as `pack` does."""
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no float4_e2m1fn_x2")
    packed = TableFormat("e2m1").pack(torch.tensor([[1, 2, 15, 8]]))
    assert packed.tolist() == [[0x21, 0x8F]]
    assert packed.view(torch.float4_e2m1fn_x2).shape == (1, 2)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.sampled_from(((), (3,), (2, 2))), st.integers(0, 255))
def test_ternary_packing_is_exact_and_base_three(count, batch, seed):
    codes = torch.randint(3, (*batch, count), generator=torch.Generator().manual_seed(seed))
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*batch, -(-count // 5))
    assert torch.equal(unpack_ternary(packed, count).long(), codes)
    padded = np.pad(codes.numpy().reshape(-1, count), ((0, 0), (0, -count % 5)))
    numbers = [int("".join(str(d) for d in five[::-1]), 3) for five in padded.reshape(-1, 5)]
    assert packed.flatten().tolist() == numbers


@settings(deadline=None, max_examples=120)
@given(st.data(), st.integers(1, 30), st.integers(1, 5))
def test_every_format_packs_all_its_codes_and_survives_json(data, columns, rows):
    format = data.draw(formats(columns))
    codes = torch.arange(rows * columns).reshape(rows, columns) % format.levels
    packed = format.pack(codes)
    assert packed.shape == (rows, format.packed_length(columns))
    assert torch.equal(format.unpack(packed, columns).long(), codes)
    assert format_from_spec(json.loads(json.dumps(format.spec()))) == format
    assert format.describe()


@pytest.mark.parametrize("name", FORMATS)
def test_names_build_formats(name):
    format = number_format(name.upper().replace("_", "-"))
    assert format == FORMATS[name]
    assert format_from_spec(json.loads(json.dumps(format.spec()))) == format


@pytest.mark.parametrize(
    ("name", "bits"),  # of a 256 x 512 weight, by hand
    [
        ("int5", 5 + (16 + 8) / 512), ("nf4", 4 + 16 / 512), ("mxfp4", 4.25), ("nvfp4", 4.5 + 32 / 2**17),
        ("fp8_e4m3", 8 + 32 / 512), ("fp8_e5m2_tensor", 8 + 32 / 2**17), ("fp8_e4m3_block", 8 + 8 * 32 / 2**17),
        ("ternary", 8 * 103 / 512 + 16 / 512),
    ],
)  # fmt: skip
def test_bits_by_hand(name, bits):
    assert number_format(name).stored_bits((256, 512)) == bits * 256 * 512


def test_double_quantized_scales_by_hand():
    format = number_format("nf4", group_size=64, scale="uint8")  # QLoRA: 8/64 + 32/(64 * 256) bits for the scales
    assert format.stored_bits((256, 512)) == (4 + 8 / 64 + 32 / (64 * 256)) * 256 * 512


def test_padding_is_counted():
    format = IntFormat(4, 8, symmetric=True, pad=True)
    assert format.layout((3, 10)).stored == 16
    assert format.stored_bits((3, 10)) == 3 * (16 * 4 + 2 * 16)


def test_own_tables_are_stored_in_the_spec():
    format = TableFormat((-2, 0, 1, 5), 4)
    assert format.code_bits == 2 and format.levels == 4
    assert format.spec() == {"type": "table", "table": [-2.0, 0.0, 1.0, 5.0], "group_size": 4}
    assert format_from_spec(format.spec()) == format
    assert format.decode(torch.tensor([[3, 0]]), None, torch.float64).tolist() == [[5.0, -2.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TableFormat("nf5"), r"unknown table 'nf5'; expected one of nf4, nf3, e2m1"),
        (lambda: TableFormat((1.0,)), r"a table of 1 levels .*expected 2 to 256 finite numbers"),
        (lambda: TableFormat((0.0, math.nan)), r"expected 2 to 256 finite numbers"),
        (lambda: TableFormat((2.0, 2.0)), r"not all one"),
        (lambda: TableFormat("nf4", 0), r"TableFormat\(group_size=0\) must be at least 1"),
        (lambda: TableFormat("nf4", group_rows=0), r"TableFormat\(group_rows=0\) must be at least 1"),
        (lambda: TableFormat("nf4", scale="e9"), r"scale='e9' is no storage of scales; expected one of half"),
        (lambda: IntFormat(4, scale="fp8"), r"scale='fp8' is no storage of scales"),
        (lambda: number_format("int7"), r"unknown number format 'int7'; expected one of int2"),
        (lambda: number_format("nf4", symmetric=True), r"'nf4' does not take symmetric; leave those out"),
        (lambda: number_format("mxfp4", group_size=16), r"'mxfp4' does not take group_size"),
        (lambda: format_from_spec({"type": "bogus"}), r"unknown number format type 'bogus'; .* knows int, table"),
        (lambda: format_from_spec({"bits": 4}), r"unknown number format type None"),
        (lambda: format_from_spec({"type": "int", "bits": 4, "x": 1}), r"'int' has no field x; .*bits, group_size"),
        (
            lambda: TableFormat((0.0, 1.0, 2.0, 3.0, 4.0)).pack(torch.tensor([5])),
            r"pack got code 5; expected 0 <= code",
        ),
        (lambda: pack_ternary(torch.tensor([3])), r"pack_ternary got codes in \[3, 3\]; expected 0, 1 or 2"),
        (lambda: register_format(IntFormat), r"type 'int' is already registered by IntFormat"),
    ],
)
def test_messages(call, message):
    with pytest.raises(FormatError, match=message):
        call()


@pytest.mark.parametrize("name", SCALES)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), power=st.integers(-30, 30))
def test_scales_survive_storage(name, seed, power):
    """Zero stays zero, nonzero stays nonzero, and the rounding is that of the storage."""
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(3, 200, generator=generator) + 0.1) * 2.0**power
    scale[0, 7] = 0
    kind = SCALES[name]
    outer = kind.outer(scale)
    spread = None if outer is None else kind.spread(outer, (3, 200))
    assert (None if outer is None else tuple(outer.shape)) == kind.outer_shape((3, 200))
    stored = kind.store(scale, spread, kind.dtype_for(scale))
    loaded = kind.load(stored, spread, torch.float64)
    assert stored.element_size() * 8 == kind.bits
    assert bool((loaded[scale > 0] > 0).all())
    if name == "e8m0":
        assert torch.equal(loaded[scale > 0], 2.0 ** torch.ceil(torch.log2(scale[scale > 0].double())))
        return
    assert float(loaded[0, 7]) == 0
    step = {"half": 2.0**-8, "bfloat16": 2.0**-8, "float32": 2.0**-24, "e4m3": 2.0**-4, "uint8": 1.1 / 255 / 2 / 0.1}[
        name
    ]
    assert float(((loaded - scale) / scale)[scale > 0].abs().max()) <= step


def test_scales_as_bytes_are_those_of_torch():
    scale = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.01
    kind = SCALES["e4m3"]
    outer = kind.outer(scale)
    expected = (scale / outer).to(torch.float8_e4m3fn)
    assert torch.equal(kind.store(scale, outer, torch.uint8), expected.view(torch.uint8))
    if hasattr(torch, "float8_e8m0fnu"):
        every = torch.arange(255, dtype=torch.uint8)
        loaded = SCALES["e8m0"].load(every, None, torch.float32)
        assert torch.equal(loaded, every.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize(("name", "largest"), [("e8m0", 1e39), ("e4m3", 1e42), ("uint8", 1e42), ("float32", 1e39)])
def test_scales_that_do_not_fit_are_refused(name, largest):
    scale, kind = torch.tensor([[largest]], dtype=torch.float64), SCALES[name]
    with pytest.raises(FormatError, match=r"needs a scale of .*above the largest float32 .*divide the weight"):
        kind.store(scale, kind.outer(scale), kind.dtype_for(scale))
