"""Trellis-coded weights in one launch: against float64 from the definition of the codes, on odd sizes."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st
from kernels.triton_cases import DEVICE, check, inputs, serving, trellis

from tnc.formats import TrellisFormat
from tnc.kernels import trellis as row
from tnc.kernels import trellis_fixes, trellis_launch, trellis_ops
from tnc.kernels.trellis_launch import rebuild
from tnc.kernels.trellis_ops import stream_of
from tnc.quant import rtn
from tnc.terms import Quantized, Sum

pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


@given(data=st.data())
def test_fixes_make_the_states_of_the_words_right_and_codes_come_back(data):
    bits, state_bits = data.draw(st.sampled_from(((2, 12), (2, 16), (3, 12), (3, 9), (4, 12), (4, 8))))
    rows, columns = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 60))
    format = TrellisFormat(bits, state_bits, path="diagonal", length=data.draw(st.sampled_from((80, 256))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    layout = stream_of(rows, columns, format)
    packed = layout.pack(codes)
    assert torch.equal(layout.codes(packed["stream"]), codes)
    at = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    shown = layout.shown(packed["stream"], *at)
    levels = TrellisFormat.decode(format, codes, None, torch.float64) * 147.800537109375
    word = (shown * 34038481 + 76625530) & 0xFFFFFFFF
    found = sum(word >> 8 * i & 255 for i in range(4)).double() - 510
    unit = layout.words.unit
    for number in range(layout.words.units):
        for fix in packed["fixes"][packed["firsts"][0, number] : packed["firsts"][0, number + 1]].tolist():
            where = number * unit + (fix >> 16) % unit, fix & 0xFFFF
            found[where] += fix >> (16 + unit.bit_length() - 1)
    torch.testing.assert_close(found, levels, rtol=0, atol=1e-3)
    counts = packed["firsts"][0].diff()
    assert torch.equal(packed["firsts"][1].diff(), -(-counts // trellis_fixes.EACH))  # none has more than `MOST`
    assert torch.equal(packed["items"].bincount(minlength=layout.words.units), packed["firsts"][1].diff())


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "rank", "tokens"),
    [(2, 17, 40, None, 1), (2, 20, 140, 3, 2), (3, 33, 20, None, 1), (4, 17, 130, 5, 1), (2, 1, 1, None, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32])
def test_one_and_two_tokens(bits, rows, columns, rank, tokens, dtype):
    check(row, trellis(rows, columns, bits, rank=rank), inputs(tokens, columns, dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [3, 17, 32])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, None), (300, 45, None), (37, 150, 70), (20, 130, 0)])
def test_tiles(bits, tokens, rows, columns, rank):
    check(row, trellis(rows, columns, bits, rank=rank), inputs(tokens, columns, torch.float16))


@pytest.mark.parametrize("most", [2, 32])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 20, 140), (5, 300, 45), (33, 300, 45)])
def test_units_with_several_items_of_fixes(tokens, rows, columns, most, monkeypatch):
    monkeypatch.setattr(trellis_fixes, "EACH", 16)
    monkeypatch.setattr(trellis_fixes, "MOST", most)
    monkeypatch.setattr(trellis_launch, "EACH", 16)
    case = trellis(rows, columns, 2)
    firsts = row.bind(case.operator).pack(case.operator.tensors())["firsts"]
    assert 1 < int(firsts[1].diff().max()) <= most and (most > 2 or int(firsts[0].diff().max()) > 32)
    check(row, case, inputs(tokens, columns, torch.float16))


@pytest.mark.parametrize("most", [1, 2, 3, 32])
def test_items_hold_all_fixes_and_none_is_empty(most, monkeypatch):
    monkeypatch.setattr(trellis_fixes, "MOST", most)
    each, fixes = trellis_fixes.EACH, torch.arange(0, 40 * trellis_fixes.EACH)
    items = trellis_fixes.items_of(fixes)
    share = torch.ceil(fixes / items.clamp_min(1))
    size = torch.ceil(share / each) * each  # as the device code finds it
    assert (items <= most).all() and torch.equal(items == 0, fixes == 0)
    assert (items * size >= fixes).all() and ((items - 1) * size < fixes)[1:].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_more_tokens_and_other_dtypes(dtype):
    case = trellis(300, 70, 2, rank=5, factors_first=True, dtype=torch.float32)
    for tokens in (5, 33, 0):
        x = inputs(tokens, 70, dtype)
        if dtype == torch.float64:
            y = row.bind(case.operator)(x, row.bind(case.operator).pack(case.operator.tensors()))
            torch.testing.assert_close(y, x @ case.matrix.T, rtol=1e-6, atol=1e-6)
        else:
            check(row, case, x)


@pytest.mark.parametrize("scale", ["half", "uint8"])
def test_packing_is_undone_bit_for_bit(scale):
    generator = torch.Generator().manual_seed(0)
    operator = rtn(torch.randn(40, 33, generator=generator), TrellisFormat(2, 8, path="diagonal", scale=scale))
    bound, tensors = row.bind(operator), operator.tensors()
    again = bound.unpack(bound.pack(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], t) for name, t in tensors.items())


def test_the_weight_written_once_is_that_of_torch():
    case = trellis(300, 70, 3)
    bound = row.bind(case.operator)
    held = bound.pack(case.operator.tensors())
    coded = bound.coded(held, torch.float32)
    torch.testing.assert_close(rebuild(coded, torch.float32), case.matrix.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(trellis_ops.dense(coded, torch.float64), case.matrix, rtol=1e-6, atol=1e-7)


def test_gradients():
    case = trellis(40, 33, 2, rank=3, dtype=torch.float32)
    bound, tensors = row.bind(case.operator), case.operator.tensors()
    held = bound.pack(tensors)
    left, right = held["1.left"].requires_grad_(), held["1.right"].requires_grad_()
    x = inputs(5, 33, torch.float32).requires_grad_()
    seed = inputs(5, 40, torch.float32, seed=3)
    got = torch.autograd.grad(bound(x, held), (x, left, right), seed)
    base = case.matrix.float() - (left @ right).detach()
    exact = torch.autograd.grad(x @ (base + left @ right).T, (x, left, right), seed)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    names = ("stream", "firsts", "items", "fixes", "steps")
    arguments = (x, *(held[name] for name in names), left, right, 2, 12, 256)
    torch.library.opcheck(
        trellis_ops.trellis, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_what_it_does_not_run_is_said():
    weight = torch.randn(20, 32, device=DEVICE)
    for format, reason in (
        (TrellisFormat(2, 4), "it decodes anti-diagonals of the code 1mad, not columns of 1mad"),
        (TrellisFormat(2, 4, "3inst", path="diagonal"), "it decodes anti-diagonals of the code 1mad, not diagonals of"),
        (TrellisFormat(2, 4, path="diagonal", group_size=8), "a row has 4 scales; it takes one"),
        (TrellisFormat(2, 4, path="diagonal", length=16), "sequences of at most 16 rows may begin twice in 16 rows"),
    ):
        assert row.refusal(rtn(weight, format)).startswith(reason)
    base = trellis(20, 32, 2)
    assert row.refusal(base.operator) is None
    assert (
        row.refusal(Sum((base.operator, base.operator)))
        == "it runs a trellis-coded term, alone or plus one low-rank term"
    )
    wide = Quantized.from_codes(
        torch.zeros(1, 70_000, dtype=torch.uint8), torch.ones(1, 1).half(), None, TrellisFormat(2, path="diagonal")
    )
    assert row.refusal(wide) == "70000 columns are more than 65536"
    assert DEVICE == "cuda" or "needs a CUDA device" in serving(base, "trellis", "cpu")
