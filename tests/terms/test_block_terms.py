"""`BlockLowRank`, `Monarch` and `Blast` by hand, their shape errors, and the einsum kernel on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import ShapeError
from tnc.kernels import choose
from tnc.terms import Blast, BlockLowRank, LowRank, Monarch, dense64
from tnc.testing import check_term, expressions
from tnc.testing.oracle import magnitude

KINDS = ("block_low_rank", "monarch", "blast")


def test_by_hand():
    left = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(2, 2, 1, 1)
    right = torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1)
    assert BlockLowRank(left, right).to_dense().flatten().tolist() == [1.0, 2.0, 30.0, 40.0]
    assert Monarch(left, right).to_dense().flatten().tolist() == [1.0, 30.0, 2.0, 40.0]
    term = BlockLowRank(left, right)
    assert (term.shape, term.blocks, term.rank, term.storage_bits) == ((4, 1), (2, 1), 1, 6 * 32)
    assert term.spec() == {"kind": "block_low_rank", "shape": [4, 1], "blocks": [2, 1], "rank": 1}


def test_blast_by_hand():
    left, right = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[1.0]], [[3.0]]])
    term = Blast(left, torch.tensor([[[1.0], [0.0]], [[-1.0], [5.0]]]), right)
    assert term.to_dense().tolist() == [[1.0, 0.0], [-2.0, 30.0]]
    assert (term.shape, term.blocks, term.rank, term.storage_bits) == ((2, 2), (2, 2), 1, 8 * 32)


def test_equal_couplings_are_low_rank():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 4, 2, generator=g), torch.randn(2, 2, 5, generator=g)
    term = Blast(left, torch.ones(3, 2, 2), right)
    low_rank = LowRank(left.flatten(0, 1), right.transpose(0, 1).flatten(1))
    torch.testing.assert_close(term.to_dense(), low_rank.to_dense())


@settings(max_examples=30, deadline=None)
@given(term=expressions(kinds=KINDS, depth=0))
def test_laws(term):
    check_term(term)


@settings(max_examples=60, deadline=None)
@given(term=expressions(kinds=(*KINDS, "low_rank")), tokens=st.sampled_from((0, 1, 3, 70)), seed=st.integers(0, 99))
def test_the_einsum_kernel_contracts_them(term, tokens, seed):
    x = torch.randn(tokens, term.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bound, _ = choose(term, torch.device("cpu"), x.dtype, backend="einsum")
    excess = (bound(x, term.tensors()) - x @ dense64(term).T).abs() - 1e-10 * (x.abs() @ magnitude(term).T)
    assert not bool((excess > 0).any())
    if term.kind in KINDS:
        assert "[" not in bound.describe(), "a leaf is contracted, not rebuilt"


@pytest.mark.parametrize(
    ("cls", "shapes"),
    [(BlockLowRank, ((2, 3, 4, 5), (4, 2, 6, 7))), (Monarch, ((2, 3, 4, 5), (2, 4, 5, 7))), (Monarch, ((2, 3), (3, 2))),
     (Blast, ((2, 3, 4), (2, 5, 4), (4, 4, 7))), (Blast, ((2, 3, 4), (2, 5, 3), (5, 4, 7))), (Blast, ((2,), (3,), (4,)))
     ],
)  # fmt: skip
def test_factors_must_fit(cls, shapes):
    with pytest.raises(ShapeError, match=rf"{cls.__name__} got left .* expected \(out_blocks, rows, .*blocks and rank"):
        cls(*(torch.zeros(shape) for shape in shapes))
