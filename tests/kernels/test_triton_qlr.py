"""Q + L R in one launch: against the drawn numbers, on odd sizes, with outputs that begin as NaN."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE, answer, check, inputs, q_plus_lr, rounded, serving

from tnc.formats import IntFormat, number_format
from tnc.kernels import qlr, tuned
from tnc.kernels.base import Base
from tnc.kernels.qlr import QLR
from tnc.kernels.qlr_launch import rebuild, tile, vector
from tnc.kernels.qlr_ops import dense
from tnc.kernels.qlr_ops import qlr as op
from tnc.terms import Dense, LowRank, Product, Quantized, Sum

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 70])
def test_formats(bits, symmetric, tokens):
    case = q_plus_lr(37, 320, bits, group=64, symmetric=symmetric, rank=9)
    check(qlr, case, inputs(tokens, 320, HALF))


TABLES = [
    number_format("nf4", group_size=64), number_format("nf4", group_size=None), number_format("nf3", group_size=64),
    number_format("nf4", group_size=64, scale="uint8"), number_format("fp4", group_size=32),
    number_format("mxfp4"), number_format("nvfp4"), IntFormat(5, group_size=64), IntFormat(6, group_size=64),
]  # fmt: skip


@pytest.mark.parametrize("format", TABLES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 70])
def test_tables_and_odd_widths(format, tokens):
    """Levels looked up, scales of every kind, codes of 5 and 6 bits; the stored tensors come back bit for bit."""
    case = rounded(37, 320 if format.group_of(320) != 320 else 256, format, rank=9)
    columns = case.operator.shape[1]
    for dtype in (HALF, BRAIN, SINGLE):
        check(qlr, case, inputs(tokens, columns, dtype))
    bound, stored = qlr.bind(case.operator), case.operator.tensors()
    back = bound.unpack(bound.pack(stored))
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("factor_format", [IntFormat(8), IntFormat(4), number_format("nf4")], ids=str)
def test_quantized_factors_are_written_out_once(factor_format):
    case = rounded(37, 256, IntFormat(4, group_size=64), rank=16, factor_format=factor_format)
    assert "written out in 16 bits" in qlr.bind(case.operator).describe()
    for tokens in (1, 5, 70):
        check(qlr, case, inputs(tokens, 256, BRAIN))
    bound, stored = qlr.bind(case.operator), case.operator.tensors()
    back = bound.unpack(bound.pack(stored))
    assert back.keys() == stored.keys() and all(torch.equal(back[k], t) for k, t in stored.items())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("launch", "tokens"), [(vector, 1), (vector, 2), (tile, 5), (tile, 32), (tile, 40)])
def test_siblings_in_one_launch_are_what_each_gives_alone(launch, tokens, shared):
    """q, k and v of unequal sizes and ranks in one launch; one t where they share a right factor."""
    packs = [packed_of(q_plus_lr(rows, 320, 4, group=64, rank=rank, seed=rows))
             for rows, rank in ((37, 9), (64, 9 if shared else 16), (5, 9 if shared else 3))]  # fmt: skip
    if shared:
        packs = [replace(each, right=packs[0].right) for each in packs]
    x = inputs(tokens, 320, HALF)
    together = launch(x, *packs)
    alone = [x.double() @ dense(each, torch.float64).T for each in packs]
    parts = together.flatten().split([a.numel() for a in alone])
    for part, exact in zip(parts, alone, strict=True):
        error = part.reshape(exact.shape).double() - exact
        assert (error.norm(dim=-1) <= 2e-3 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "rank"),
    [
        (1, 32, 32, 1),
        (131, 256, 128, 16),
        (8, 200, None, 0),
        (5, 7, None, 3),
        (40, 640, 320 // 10, 130),
        (33, 512, 256, None),
    ],
)
def test_sizes_tails_and_ranks(rows, columns, group, rank, tokens):
    case = q_plus_lr(rows, columns, 4, group=group, rank=rank, factors_first=True)
    check(qlr, case, inputs(tokens, columns, HALF))


@pytest.mark.parametrize("scale", [HALF, BRAIN])
@pytest.mark.parametrize("factors", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, torch.float64])
def test_dtypes_of_scales_factors_and_inputs(scale, factors, dtype):
    case = q_plus_lr(19, 128, 4, group=32, rank=5, scale=scale, dtype=factors)
    for tokens in (1, 4):
        x = inputs(tokens, 128, dtype)
        if dtype == torch.float64:
            exact = x @ case.matrix.T
            assert (answer(qlr, case, x) - exact).norm() <= 1e-12 * exact.norm()
        elif factors == SINGLE or dtype != SINGLE:
            check(qlr, case, x)


def test_large_and_small_scales_stay_exact():
    """The offset of the bit trick cancels whatever the scale: no loss relative to the weight."""
    for factor in (2.0**-12, 2.0**10):
        case = q_plus_lr(16, 128, 4, group=128, rank=None)
        term = case.operator
        scaled = Quantized(term.codes, term.scale * factor, term.zero, term.format, term.in_features)
        case.operator, case.matrix = scaled, case.matrix * factor
        check(qlr, case, inputs(1, 128, BRAIN))


def test_a_row_does_not_depend_on_its_neighbours():
    """Runs are repeatable, and a token alone gives what it gives among others."""
    case = q_plus_lr(37, 256, 4, group=128, rank=8)
    x = inputs(20, 256, HALF)
    y = answer(qlr, case, x)
    assert torch.equal(y, answer(qlr, case, x))
    assert torch.equal(answer(qlr, case, x[:5]), y[:5])


def test_no_tokens_and_leading_dimensions():
    case = q_plus_lr(9, 64, 4, group=32, rank=2)
    for batch in [(), (0,), (2, 3), (2, 0, 3)]:
        x = torch.randn(*batch, 64).to(HALF).to(DEVICE)
        y = answer(qlr, case, x)
        assert y.shape == (*batch, 9)
        exact = x.double() @ case.matrix.T
        assert (y.double() - exact).norm() <= 2e-3 * exact.norm()


def test_inputs_with_strides():
    case = q_plus_lr(9, 64, 4, group=32, rank=2)
    x = inputs(64, 3, HALF).T
    assert not x.is_contiguous()
    check(qlr, case, x)


def packed_of(case):
    bound = qlr.bind(case.operator)
    return bound.packed(bound.pack(case.operator.tensors()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_rebuilt_weight(bits):
    case = q_plus_lr(37, 320, bits, group=64, rank=9)
    packed = packed_of(case)
    weight = rebuild(packed, HALF)
    assert (weight.double() - case.matrix).norm() <= 2e-3 * case.matrix.norm()
    torch.testing.assert_close(dense(packed, torch.float64), case.matrix, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [64, None])
def test_packing_keeps_every_bit(bits, group):
    operator = q_plus_lr(5, 192, bits, group=group, rank=3).operator
    bound = qlr.bind(operator)
    packed = bound.pack(operator.tensors())
    again = bound.unpack(packed)
    assert again.keys() == operator.tensors().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in operator.tensors().items())
    assert packed["1.left"] is operator.tensors()["1.left"]


def test_packed_words_take_the_room_of_the_codes():
    """A zero point takes 16 bits in the place of ``bits``, nothing else grows."""
    operator = q_plus_lr(64, 1024, 4, group=128, rank=None).operator
    held = qlr.bind(operator).pack(operator.tensors())
    stored = sum(t.numel() * t.element_size() * 8 for t in held.values())
    assert stored == operator.storage_bits + 64 * 8 * (16 - 4)


def test_gradients_are_those_of_the_dense_weight():
    case = q_plus_lr(19, 64, 4, group=32, rank=3, dtype=SINGLE)
    held = qlr.bind(case.operator).pack(case.operator.tensors())
    left, right = (held[f"1.{name}"].requires_grad_() for name in ("left", "right"))
    for tokens in (1, 5):
        x = inputs(tokens, 64, SINGLE).requires_grad_()
        seed = inputs(tokens, 19, SINGLE, seed=3)
        bound = qlr.bind(case.operator)
        got = torch.autograd.grad(bound(x, held), (x, left, right), seed)
        base = case.matrix - (left @ right).detach().double()
        dense_y = x.double() @ (base + left.double() @ right.double()).T
        for mine, theirs in zip(got, torch.autograd.grad(dense_y, (x, left, right), seed.double()), strict=True):
            torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=2e-4, atol=1e-5)


def test_the_operator_is_registered_properly():
    packed = packed_of(q_plus_lr(9, 64, 4, group=32, rank=2, dtype=SINGLE))
    x = inputs(2, 64, SINGLE).requires_grad_()
    arguments = (x, packed.low, packed.high, packed.groups, packed.left, packed.right, None, 4, 32, "half", "")
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_compiles_without_graph_breaks():
    case = q_plus_lr(9, 64, 4, group=32, rank=2)
    bound = qlr.bind(case.operator)
    held = bound.pack(case.operator.tensors())
    compiled = torch.compile(lambda x: bound(x, held) + 1, fullgraph=True, backend="aot_eager")
    x = inputs(3, 64, HALF)
    assert torch.equal(compiled(x), bound(x, held) + 1)


def quantized(group, columns=256, bits=4, dtype=HALF):
    return q_plus_lr(4, columns, bits, group=group, rank=None, scale=dtype).operator


def test_what_it_does_not_run_is_said():
    term = quantized(32)
    low_rank = LowRank(torch.ones(4, 1), torch.ones(1, 256))
    trellis = rounded(8, 256, number_format("trellis2")).operator
    refused = {
        "it runs a quantized term, alone or plus one low-rank term": [
            Dense(torch.ones(4, 256)), Sum((term, low_rank, low_rank)), Sum((low_rank, low_rank)), Product((term,)),
        ],
        "groups of 16 columns do not fit its units of 128; it takes multiples of 32 that divide it": [quantized(16)],
        "groups of 96 columns do not fit its units of 128": [quantized(96, 288)],
        "groups of 32 columns do not fit its units of 256; it takes multiples of 64": [quantized(32, bits=3)],
        "it decodes codes that stand alone, not TrellisFormat": [trellis],
        "tables of 256 levels": [rounded(8, 256, number_format("fp8_e4m3")).operator],
        "scales are torch.float32; with integers it reads 16-bit scales": [quantized(32, dtype=SINGLE)],
    }  # fmt: skip
    for reason, operators in refused.items():
        for operator in operators:
            assert (qlr.refusal(operator) or "").startswith(reason), (reason, qlr.refusal(operator))
    assert qlr.refusal(Sum((low_rank, term))) is None
    assert qlr.refusal(quantized(None, 200)) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="about a machine without a GPU")
def test_without_a_gpu_the_row_says_so():
    assert serving(q_plus_lr(4, 64, 4, group=32, rank=1), "qlr", "cpu").startswith("it needs a CUDA device")


def test_predicted_times_are_those_of_the_launch(monkeypatch):
    monkeypatch.setattr(tuned, "_file", lambda device: "h200")
    monkeypatch.setattr(tuned, "own_table", lambda device: None)
    bound = QLR(Base(IntFormat(4, group_size=128), 4096, BRAIN), "0.", "1.", None, 4096, 64)
    gpu = torch.device("cuda")
    at = {"rows": 4096, "columns": 4096, "rank": 64, "bits": 4}
    timed = {(row["kernel"], row["tokens"]): row["microseconds"] for row in tuned.table("h200")["rows"]
             if all(row.get(key) == value for key, value in at.items()) and "tokens" in row}  # fmt: skip
    assert bound.microseconds(1, gpu) == timed["qlr_vector", 1] and bound.microseconds(16, gpu) == timed["qlr_tile", 16]
    other = tuned.predicted("qlr_tile", gpu, **at, tokens=2)
    assert bound.microseconds(2, gpu) == min(timed["qlr_vector", 2], other), "the faster of the two"
    assert bound.microseconds(33, gpu) is None and bound.microseconds(1, torch.device("cpu")) is None
    made = qlr.bind(q_plus_lr(9, 64, 4, group=32, rank=2).operator)
    assert (made.rows, made.rank, qlr.bind(quantized(32)).rank) == (9, 2, 0)
