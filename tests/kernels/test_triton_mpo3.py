"""Three-core MPOs in one launch: against the definition in float64, on odd modes."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE, Case, answer, check, inputs, low_rank

from tnc.kernels import mpo3 as row
from tnc.terms import Mpo

HALF = torch.float16


pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


def mpo(outs, ins, a, b, *, dtype=HALF, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, outs[0], ins[0], a), (a, outs[1], ins[1], b), (b, outs[2], ins[2], 1)]
    cores = [(torch.randn(s, generator=generator) / (s[2] * s[3]) ** 0.5).to(dtype) for s in shapes]
    matrix = torch.einsum("xoia,apjb,bqkz->opqijk", *(core.double() for core in cores))
    rows = outs[0] * outs[1] * outs[2]
    return Case(Mpo(tuple(core.to(DEVICE) for core in cores)), matrix.reshape(rows, -1).to(DEVICE))


MODES = [
    ((5, 3, 2), (3, 7, 6), 4, 3),
    ((4, 4, 4), (4, 4, 4), 8, 8),
    ((1, 1, 1), (1, 1, 1), 1, 1),
    ((17, 2, 3), (2, 17, 1), 1, 17),
    ((2, 3, 17), (1, 2, 18), 9, 2),
]


@pytest.mark.parametrize("tokens", [1, 3, 5])
@pytest.mark.parametrize("modes", MODES)
def test_modes(modes, tokens):
    case = mpo(*modes)
    check(row, case, inputs(tokens, case.operator.shape[1], HALF))


@pytest.mark.parametrize("tile", [
    {"bonds": 1, "tokens_a_step": 1, "steps": 1, "warps": 4, "stages": 1},
    {"bonds": 8, "tokens_a_step": 4, "steps": 1, "warps": 4, "stages": 1},
    {"bonds": 4, "tokens_a_step": 2, "steps": 4, "warps": 4, "stages": 1},
], ids=["small", "no slices", "steps"])  # fmt: skip
@pytest.mark.parametrize("modes", [((3, 2, 4), (7, 3, 5), 6, 4), ((2, 3, 16), (5, 16, 16), 5, 3)])
def test_every_tile_gives_the_same(modes, tile):
    case = mpo(*modes)
    x = inputs(5, case.operator.shape[1], HALF)
    exact = x.double() @ case.matrix.T
    assert (row.launched(x, *case.operator.cores, tile).double() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    check(row, mpo((5, 3, 2), (3, 7, 6), 4, 3, dtype=dtype), inputs(3, 126, dtype))


def test_counters_are_left_at_zero(counters_taken):
    taken = counters_taken(row)
    case = mpo((3, 2, 4), (7, 3, 5), 6, 4)
    answer(row, case, inputs(5, case.operator.shape[1], HALF))
    assert taken and all(each.numel() and not each.any() for each in taken)


def test_more_tokens_and_a_token_among_others(monkeypatch):
    monkeypatch.setattr(row, "FUSED_TOKENS", 6)
    case = mpo((3, 2, 5), (2, 3, 4), 3, 5)
    x = inputs(row.FUSED_TOKENS + 1, 24, HALF)
    y = check(row, case, x)
    assert y.shape == (row.FUSED_TOKENS + 1, 30)
    few = answer(row, case, x[:6])
    assert torch.equal(few, answer(row, case, x[:6]))
    assert torch.equal(answer(row, case, x[:5]), few[:5])


def test_no_tokens_and_leading_dimensions():
    case = mpo((3, 2, 5), (2, 3, 4), 3, 5)
    for batch in [(), (0,), (2, 3)]:
        x = torch.randn(*batch, 24).to(HALF).to(DEVICE)
        y = answer(row, case, x)
        assert y.shape == (*batch, 30)
        exact = x.double() @ case.matrix.T
        assert (y.double() - exact).norm() <= 2e-3 * exact.norm()


def test_gradients():
    case = mpo((3, 2, 5), (2, 3, 4), 3, 5, dtype=torch.float32)
    cores = [core.requires_grad_() for core in case.operator.cores]
    x = inputs(4, 24, torch.float32).requires_grad_()
    seed = inputs(4, 30, torch.float32, seed=3)
    got = torch.autograd.grad(row.mpo3(x, *cores), (x, *cores), seed)
    exact = torch.autograd.grad(x @ Mpo(tuple(cores)).to_dense().T, (x, *cores), seed)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(
        row.mpo3, (x, *cores), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_what_it_does_not_run_is_said():
    cores = mpo((2, 2, 2), (2, 2, 2), 2, 2).operator.cores
    reasons = {
        "it runs an MPO of three cores": low_rank(3, 4, 1).operator,
        "the modes are padded": Mpo(cores, features=(7, 8)),
        "modes (2, 33, 2, 1, 1, 1) do not all lie between 1 and 32": mpo((2, 33, 2), (1, 1, 1), 1, 1).operator,
        "bonds 65, 1 do not both lie between 1 and 64": mpo((1, 1, 1), (1, 1, 1), 65, 1).operator,
        "bonds 0, 1 do not both lie between 1 and 64": mpo((1, 1, 1), (1, 1, 1), 0, 1).operator,
        "o3 i2 i3 pad to 32768, above 16384: cores 2 and 3, merged, do not fit a program": mpo(
            (1, 1, 17), (1, 17, 17), 1, 1
        ).operator,
    }
    for reason, operator in reasons.items():
        assert row.refusal(operator) == reason
    assert row.refusal(mpo((28, 32, 16), (16, 16, 16), 32, 64).operator) is None
    assert row.refusal(mpo((16, 16, 16), (16, 16, 16), 32, 32).operator) is None
