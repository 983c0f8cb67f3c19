"""Grouped experts on a GPU: fresh inputs and routings, graphs that replay with another routing."""

from functools import cache

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")
pytest.importorskip("transformers")

import transformers
from kernels.triton_cases import ROUNDING, q_plus_lr, rounded

import tnc
from tnc.experts import unfuse_experts
from tnc.formats import number_format
from tnc.kernels import experts as row
from tnc.kernels import qlr
from tnc.kernels.experts_launch import Stacked

BRAIN = torch.bfloat16
FRESH = 50


def held(cases):
    bounds = [qlr.bind(case.operator) for case in cases]
    members = [b.packed(b.pack(case.operator.tensors())) for b, case in zip(bounds, cases, strict=True)]
    return torch.stack([case.matrix for case in cases]), Stacked.of(members)


def several(experts, rows, columns, bits, ranks):
    return held([q_plus_lr(rows, columns, bits, group=128, rank=ranks[e % len(ranks)], dtype=BRAIN, seed=e)
                 for e in range(experts)])  # fmt: skip


def of_table(name):
    return held([rounded(300, 1024, number_format(name, group_size=64), rank=64, seed=e) for e in range(4)])


CASES = {
    **{f"int{bits}": lambda bits=bits: several(8, 520, 1024, bits, (64,)) for bits in (2, 3, 4, 8)},
    "ranks": lambda: several(6, 300, 2048, 4, (64, 0, 8, 200)),
    "alone": lambda: several(16, 768, 2048, 4, (0,)),
    "many": lambda: several(128, 96, 256, 4, (8, 16)),
    "nf4": lambda: of_table("nf4"),
}


@cache
def case_of(name):
    return CASES[name]()


TOKENS = [1, 2, 5, 16, 64, 300]  # 1 and, from 8 experts, 2: each pair by itself


def arguments(s):
    return (s.low, s.high, s.groups, s.left, s.right, s.firsts, s.gain, s.ranks, s.bits, s.group, s.scale, s.table)


def drawn(tokens, experts, columns, seed):
    """x and (tokens, 2) experts, uneven, some of them none."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, device="cuda").to(BRAIN)
    share = torch.rand(tokens, 2, generator=generator, device="cuda") ** (1 + seed % 4)
    return x, (share * (experts + 0.5)).long()


def answer(stacked, x, index):
    order, tiles = row.route(index.flatten(), len(stacked.ranks))
    return row.experts(x, index.flatten(), order, tiles, *arguments(stacked))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_fresh_inputs_agree_with_float64_and_with_a_second_run(name, tokens):
    matrices, stacked = case_of(name)
    experts, _, columns = matrices.shape
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory begins as NaN
    for seed in range(FRESH):
        x, index = drawn(tokens, experts, columns, seed)
        y = answer(stacked, x, index)
        assert torch.equal(y, answer(stacked, x, index))
        every = torch.einsum("tk,enk->ten", x.double(), matrices)
        every = torch.cat([every, torch.zeros_like(every[:, :1])], 1)
        exact = torch.stack([every[torch.arange(tokens), index[:, k]] for k in range(2)], 1).flatten(0, 1)
        assert ((y.double() - exact).norm(dim=-1) <= ROUNDING[BRAIN] * exact.norm(dim=-1)).all()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("pairs", "experts"), [(1, 1), (40, 128), (2048, 128), (8192, 5), (9000, 64)])
def test_the_order_is_that_of_a_stable_sort(pairs, experts):
    for seed in range(5):
        generator = torch.Generator("cuda").manual_seed(seed)
        index = torch.randint(-1, experts + 2, (pairs,), generator=generator, device="cuda")
        order, tiles = row.route(index, experts)
        same, cut = row._routed(index, experts, row.tile_pairs(pairs, experts))
        there = cut[0] >= 0
        assert torch.equal(order, same) and torch.equal(tiles[0], cut[0])
        assert torch.equal(tiles[:, there], cut[:, there])


def test_a_captured_graph_follows_the_routing():
    _, stacked = several(8, 520, 1024, 4, (64, 8))
    x, index = drawn(16, 8, 1024, 0)
    weights = torch.rand(16, 2, device="cuda").to(BRAIN)

    def whole():
        return row.weighted_sum(answer(stacked, x, index), weights, index, 8)

    with torch.cuda.stream(torch.cuda.Stream()):
        whole()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = whole()
    for seed in range(20):
        fresh = drawn(16, 8, 1024, seed)
        x.copy_(fresh[0])
        index.copy_(fresh[1])
        graph.replay()
        assert torch.equal(y, whole())


def block():
    """Experts of a compressed Mixtral block in bfloat16 on the GPU, and the model."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        num_local_experts=6, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(BRAIN).eval()
    (name,) = unfuse_experts(model)
    small = tnc.compress(model, tnc.recipe("lorc", bits=4, group_size=128, rank=16), include=["*experts*"])
    return small.cuda().get_submodule(name), small


def test_a_module_runs_its_experts_together_and_moves_back():
    experts, model = block()
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert "together\n" in experts.explain(), experts.explain()
    with torch.no_grad():
        for tokens in (1, 16, 200):
            x, index = drawn(tokens, 6, 256, tokens)
            weights = torch.rand(tokens, 2, device="cuda").to(BRAIN)
            got, exact = experts(x, index, weights).double(), experts._one_by_one(x, index, weights).double()
            assert (got - exact).norm() <= 2 * ROUNDING[BRAIN] * exact.norm()
            compiled = torch.compile(experts, fullgraph=True)(x, index, weights).double()
            assert (compiled - got).norm() <= ROUNDING[BRAIN] * got.norm()  # a fused activation rounds less often
    back = model.cpu().state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
