"""L (R x) in one launch: against float64, on odd sizes, with outputs that begin as NaN."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import answer, check, inputs, low_rank, q_plus_lr

from tnc.kernels import low_rank as row
from tnc.terms import LowRank

pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 65])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 1, 1), (37, 300, 40), (64, 31, 8), (9, 64, 70), (131, 16, 16)]
)
def test_sizes(rows, columns, rank, tokens):
    check(row, low_rank(rows, columns, rank), inputs(tokens, columns, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, stored):
    for tokens in (1, 3):
        check(row, low_rank(19, 50, 6, dtype=stored), inputs(tokens, 50, dtype))


def test_rank_zero_and_no_tokens():
    case = low_rank(7, 9, 0)
    assert torch.equal(answer(row, case, inputs(3, 9, torch.float16)), case.matrix.new_zeros(3, 7, dtype=torch.float16))
    assert answer(row, low_rank(7, 9, 2), inputs(0, 9, torch.float16)).shape == (0, 7)


def test_gradients():
    case = low_rank(7, 20, 3, dtype=torch.float32)
    held = {name: tensor.requires_grad_() for name, tensor in case.operator.tensors().items()}
    x = inputs(4, 20, torch.float32).requires_grad_()
    weights = (x, held["left"], held["right"])
    got = torch.autograd.grad(row.bind(case.operator)(x, held), weights, inputs(4, 7, torch.float32, seed=3))
    exact = torch.autograd.grad(x @ held["right"].T @ held["left"].T, weights, inputs(4, 7, torch.float32, seed=3))
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(
        row.low_rank, weights, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_what_it_does_not_run_is_said():
    assert row.refusal(q_plus_lr(4, 64, 4, group=32, rank=1).operator) == "it runs one low-rank term"
    wide = LowRank(torch.empty(3000, 2049, device="meta"), torch.empty(2049, 3000, device="meta"))
    assert row.refusal(wide) == "rank 2049 is above 2048, where two multiplications are as fast"
