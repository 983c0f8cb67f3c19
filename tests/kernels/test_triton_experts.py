"""Grouped experts in one launch: against each expert's matrix in float64, whatever the routing."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE, ROUNDING, inputs, q_plus_lr, rounded

from tnc.formats import number_format
from tnc.kernels import experts as row
from tnc.kernels import experts_launch, qlr
from tnc.kernels.experts_launch import Stacked, launched, launched_apart, worst_tiles

HALF, BRAIN = torch.float16, torch.bfloat16


pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


def packed(case):
    bound = qlr.bind(case.operator)
    return bound.packed(bound.pack(case.operator.tensors()))


def some(ranks=(9, 0, 16), *, rows=37, columns=128, bits=4, group=64, **more):
    """Cases of experts with these ranks, and their weights side by side."""
    cases = [q_plus_lr(rows, columns, bits, group=group, rank=r, seed=s, **more) for s, r in enumerate(ranks)]
    return cases, Stacked.of([packed(case) for case in cases])


def arguments(s):
    return (s.low, s.high, s.groups, s.left, s.right, s.firsts, s.gain, s.ranks, s.bits, s.group, s.scale, s.table)


def answer(stacked, x, index):
    order, tiles = row.route(index, len(stacked.ranks))
    return row.experts(x, index, order, tiles, *arguments(stacked))


def expected(cases, x, index):
    """The pairs one by one, in float64."""
    share = len(index) // len(x)
    y = torch.zeros(len(index), cases[0].matrix.shape[0], dtype=torch.float64, device=DEVICE)
    for pair, expert in enumerate(index.tolist()):
        if 0 <= expert < len(cases):
            y[pair] = cases[expert].matrix @ x[pair // share].double()
    return y


def check(cases, stacked, x, index):
    y, exact = answer(stacked, x, index), expected(cases, x, index)
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).norm(dim=-1) <= 2 * ROUNDING[x.dtype] * exact.norm(dim=-1)).all()
    return y


def drawn(pairs, experts, *, outside=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-outside, experts + outside, (pairs,), generator=generator).to(DEVICE)


ROUTINGS = {
    "one pair": torch.tensor([1]),
    "uneven": torch.tensor([2] * 19 + [0] * 2 + [2] * 3),
    "one takes all": torch.full((40,), 2),
    "none is named": torch.tensor([-1, 3, 99]),
    "some are named": torch.tensor([0, 3, 1, -7, 2, 2, 1 << 40, 0]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_routings(routing, dtype):
    cases, stacked = some(dtype=dtype)
    index = ROUTINGS[routing].to(DEVICE)
    check(cases, stacked, inputs(len(index), 128, dtype), index)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_formats(bits, symmetric):
    cases, stacked = some((3, 8), rows=19, columns=320, bits=bits, symmetric=symmetric)
    check(cases, stacked, inputs(5, 320, HALF), drawn(10, 2))


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "mxfp4"])
def test_tables(name):
    sized = {} if "fp4" in name else {"group_size": 64}
    cases = [rounded(19, 128, number_format(name, **sized), rank=4, seed=s) for s in range(3)]
    check(cases, Stacked.of([packed(case) for case in cases]), inputs(5, 128, HALF), drawn(10, 3))


@pytest.mark.parametrize(("rows", "columns", "group", "ranks"), [
    (1, 32, 32, (1, 2)), (8, 200, None, (0, 0)), (70, 5, None, (3, 70)), (33, 512, 256, (65, 1, 0, 130)),
])  # fmt: skip
def test_sizes_tails_and_ranks(rows, columns, group, ranks):
    cases, stacked = some(ranks, rows=rows, columns=columns, group=group)
    check(cases, stacked, inputs(7, columns, HALF), drawn(14, len(ranks)))


def test_counters_are_left_at_zero(counters_taken):
    """So that the next launch, or the replay of a graph, finds them so."""
    taken = counters_taken(experts_launch)
    _, stacked = some((9, 0, 70) * 4, columns=512)
    for pairs in (4, 40):  # by themselves, in tiles
        answer(stacked, inputs(pairs // 2, 512, HALF), drawn(pairs, 12, outside=1))
    assert len(taken) == 2 and all(each.numel() and not each.any() for each in taken)


def test_many_experts_and_few_pairs():
    cases, stacked = some((2,) * 40, rows=5, columns=32, group=32)
    for pairs in (1, 8, 24):
        check(cases, stacked, inputs(pairs // min(pairs, 8), 32, HALF), drawn(pairs, 40, seed=pairs))


@pytest.mark.parametrize("tile", [
    {"rows": 16, "splits": 1, "chunks": 1, "stages": 1, "warps": 4, "programs": 0},
    {"rows": 64, "splits": 4, "chunks": 3, "stages": 1, "warps": 4, "programs": 4},
], ids=["whole", "split"])  # fmt: skip
@pytest.mark.parametrize("block", [16, 32])
def test_every_tile_gives_the_same(tile, block):
    cases, stacked = some(rows=70, columns=512)
    index, x = drawn(40, 3, outside=1), inputs(20, 512, HALF)
    order, tiles = row._routed(index, 3, block)
    y, exact = launched(x, order, tiles, stacked, block, tile).double(), expected(cases, x, index)
    assert ((y - exact).norm(dim=-1) <= 2e-3 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("tile", [
    {"rows": 8, "warps": 1, "ranks": 4, "programs": 1}, {"rows": 4, "warps": 2, "ranks": 8, "programs": 4},
], ids=["walk", "blocks"])  # fmt: skip
@pytest.mark.parametrize(("rows", "columns", "group", "ranks"), [
    (37, 128, 64, (9, 0, 16)), (1, 32, 32, (1, 2)), (8, 200, None, (0, 0)), (20, 2048, 256, (130, 1, 0)),
])  # fmt: skip
def test_pairs_by_themselves(rows, columns, group, ranks, tile):
    cases, stacked = some(ranks, rows=rows, columns=columns, group=group)
    index, x = drawn(6, len(ranks), outside=1), inputs(3, columns, HALF)
    y, exact = launched_apart(x, index, stacked, tile).double(), expected(cases, x, index)
    assert ((y - exact).norm(dim=-1) <= 2e-3 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_formats_of_pairs_by_themselves(bits):
    cases, stacked = some((3, 8) * 8, rows=19, columns=320, bits=bits)
    assert row.run_apart(8, 16)
    order, tiles = row.route(drawn(8, 16), 16)
    assert order.numel() == tiles.numel() == 0
    check(cases, stacked, inputs(4, 320, HALF), drawn(8, 16, outside=1))


def test_tables_of_pairs_by_themselves():
    for name in ("nf4", "nvfp4"):
        format = number_format(name, **({} if "fp4" in name else {"group_size": 64}))
        cases = [rounded(19, 128, format, rank=4, seed=s) for s in range(4)]
        check(cases, Stacked.of([packed(case) for case in cases]), inputs(1, 128, HALF), drawn(2, 4))


def test_a_permutation_of_tokens_permutes_the_answer():
    _, stacked = some()
    index, x = drawn(48, 3).reshape(24, 2), inputs(24, 128, HALF)
    y = answer(stacked, x, index.flatten()).reshape(24, 2, -1)
    assert torch.equal(y, answer(stacked, x, index.flatten()).reshape(24, 2, -1))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(answer(stacked, x[order], index[order].flatten()).reshape(24, 2, -1), y[order])


@pytest.mark.parametrize(("pairs", "experts"), [(1, 1), (40, 128), (37, 5), (64, 3), (300, 2)])
def test_pairs_are_ordered_as_a_stable_sort_does(pairs, experts):
    index = drawn(pairs, experts, outside=2)
    order, tiles = row.route(index, experts)
    same, cut = row._routed(index, experts, row.tile_pairs(pairs, experts))
    there = cut[0] >= 0
    assert torch.equal(order, same) and torch.equal(tiles[0], cut[0]) and torch.equal(tiles[:, there], cut[:, there])


def test_no_routing_needs_more_tiles_than_are_there():
    for pairs in range(1, 40):
        for experts in (1, 2, 7):
            index = torch.arange(pairs).clamp(max=experts)  # as uneven as can be
            assert int((row._routed(index, experts, 4)[1][0] >= 0).sum()) == worst_tiles(pairs, experts, 4)


def test_without_a_gpu_a_loop_gives_the_same(monkeypatch):
    cases, stacked = some()
    index, x = drawn(24, 3, outside=1), inputs(12, 128, HALF)
    fused = answer(stacked, x, index)
    monkeypatch.setattr(row, "_launched", lambda tensor: False)
    plain = check(cases, stacked, x, index)
    assert (plain - fused).norm() <= 2e-3 * plain.norm()
    wide = answer(stacked, x.double(), index)
    assert (wide - expected(cases, x, index)).norm() <= 1e-12 * wide.norm()


def test_no_pairs():
    _, stacked = some()
    nothing = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert answer(stacked, inputs(0, 128, HALF), nothing).shape == (0, 37)
    assert row.weighted_sum(inputs(0, 37, HALF), inputs(0, 2, HALF), nothing.reshape(0, 2), 3).shape == (0, 37)


@pytest.mark.parametrize("dtype", [HALF, torch.float64])
def test_the_weighted_sum(dtype):
    y, weights, index = inputs(12, 37, dtype), inputs(4, 3, dtype, seed=2), drawn(12, 3, outside=1).reshape(4, 3)
    y[(index.flatten() < 0) | (index.flatten() >= 3)] = float("nan")
    named = (index >= 0) & (index < 3)
    exact = (torch.where(named, weights, 0).double().unsqueeze(-1) * y.double().nan_to_num().reshape(4, 3, 37)).sum(1)
    assert (row.weighted_sum(y, weights, index, 3).double() - exact).norm() <= 2e-3 * exact.norm()


def test_gradients_are_those_of_the_dense_weights():
    cases, stacked = some((3, 0, 2), rows=5, columns=64, dtype=torch.float32)
    index, weights = drawn(8, 3, outside=1).reshape(4, 2), inputs(4, 2, torch.float32, seed=4).requires_grad_()
    x = inputs(4, 64, torch.float32).requires_grad_()
    left, right = stacked.left.requires_grad_(), stacked.right.requires_grad_()
    seed = inputs(4, 5, torch.float32, seed=3)

    def mixed():
        return row.weighted_sum(answer(stacked, x, index.flatten()), weights, index, 3)

    def plain():
        total = 0
        for expert, case in enumerate(cases):
            weight = case.matrix
            if stacked.ranks[expert]:
                member = stacked.member(expert)
                weight = weight - (member.left @ member.right).detach().double() + member.left @ member.right
            total = total + ((index == expert) * weights).sum(1, keepdim=True) * (x @ weight.to(x.dtype).T)
        return total

    wanted = (x, weights, left, right)
    for mine, theirs in zip(
        torch.autograd.grad(mixed(), wanted, seed), torch.autograd.grad(plain(), wanted, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-5)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    order, tiles = row.route(index.flatten(), 3)
    torch.library.opcheck(row.experts, (x, index.flatten(), order, tiles, *arguments(stacked)), test_utils=tests)
    torch.library.opcheck(row.route, (index.flatten(), 3), test_utils=tests[:2])
    torch.library.opcheck(row.weighted_sum, (inputs(8, 5, HALF), weights, index, 3), test_utils=tests)
