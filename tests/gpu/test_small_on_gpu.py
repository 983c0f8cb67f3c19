"""Every kernel at a small shape, short enough for compute-sanitizer (``make sanitize-gpu``)."""

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from kernels.triton_cases import ROUNDING, Case, check, inputs, low_rank, q_plus_lr, rounded, trellis

from tnc.formats import IntFormat, number_format
from tnc.kernels import experts as experts_row
from tnc.kernels import low_rank as low_rank_row
from tnc.kernels import mpo2, mpo3, qlr
from tnc.kernels import trellis as trellis_row
from tnc.kernels.experts_launch import Stacked
from tnc.kernels.hadamard import hadamard
from tnc.kernels.qlr_launch import tile, vector
from tnc.modules import FactoredLinear
from tnc.quant import rtn
from tnc.terms import Chain, Hadamard, Mpo, Product, map_tensors

BRAIN = torch.bfloat16
INT8 = IntFormat(8, 16, pad=True)
EXPERTS = 8


def cores(*shapes):
    """An `Mpo` of drawn cores, and its matrix."""
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(s, generator=generator) / (s[2] * s[3]) ** 0.5).to(BRAIN).cuda() for s in shapes]
    operator = Mpo(tuple(drawn))
    return Case(operator, Mpo(tuple(core.double() for core in drawn)).to_dense())


def small(bits, rows=70, columns=256, rank=9):
    return q_plus_lr(rows, columns, bits, group=64, rank=rank, dtype=BRAIN)


def packed(case):
    bound = qlr.bind(case.operator)
    return bound.packed(bound.pack(case.operator.tensors()))


def close(y, exact, roundings=2):
    assert (y.double() - exact).norm() <= roundings * ROUNDING[BRAIN] * exact.norm()


# kernel, its operator, and tokens that choose its launches
ROWS = {
    **{f"int{bits}, vector": (qlr, lambda bits=bits: small(bits), (1, 2)) for bits in (2, 3, 4, 8)},
    **{f"int{bits}, tile": (qlr, lambda bits=bits: small(bits), (5,)) for bits in (2, 3, 4, 8)},
    "int4, tall tile": (qlr, lambda: small(4), (40,)),
    "int4, rebuilt": (qlr, lambda: small(4), (70,)),
    "nf4": (qlr, lambda: rounded(70, 256, number_format("nf4", group_size=64), rank=9), (1, 5)),
    "low rank": (low_rank_row, lambda: low_rank(70, 100, 20, dtype=BRAIN), (1, 2, 5)),
    "two cores": (mpo2, lambda: cores((1, 6, 5, 12), (12, 7, 9, 1)), (1, 5)),
    "two cores, rebuilt": (mpo2, lambda: cores((1, 6, 5, 12), (12, 7, 9, 1)), (700,)),
    "three cores": (mpo3, lambda: cores((1, 5, 3, 8), (8, 3, 7, 6), (6, 2, 6, 1)), (1, 5)),
    "trellis, vector": (trellis_row, lambda: trellis(300, 70, 2, rank=5, dtype=BRAIN), (1, 2)),
    "trellis, tile": (trellis_row, lambda: trellis(300, 70, 2, rank=5, dtype=BRAIN), (5,)),
    "trellis, rebuilt": (trellis_row, lambda: trellis(300, 70, 3), (40,)),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row(name):
    row, make, many = ROWS[name]
    case = make()
    for tokens in many:
        check(row, case, inputs(tokens, case.operator.shape[1], BRAIN))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("launch", "tokens"), [(vector, 1), (tile, 5), (tile, 40)])
def test_siblings(launch, tokens, shared):
    cases = [q_plus_lr(rows, 256, 4, group=64, rank=9, dtype=BRAIN, seed=rows) for rows in (70, 40)]
    members, x = [packed(case) for case in cases], inputs(tokens, 256, BRAIN)
    matrices = [case.matrix for case in cases]
    if shared:
        first, second = members
        change = second.left.double() @ (first.right.double() - second.right.double())
        members, matrices = [first, replace(second, right=first.right)], [matrices[0], matrices[1] + change]
    parts = launch(x, *members).flatten().split([tokens * len(matrix) for matrix in matrices])
    for y, matrix in zip(parts, matrices, strict=True):
        close(y.view(tokens, -1), x.double() @ matrix.T)


@pytest.mark.parametrize("size", [64, 156])
def test_a_rotation(size):
    term = map_tensors(Hadamard.random(size), lambda tensor: tensor.cuda())
    x = inputs(3, size, BRAIN)
    close(hadamard(x, term.signs, term.factors, False), term.linear(x.double()))


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_rotated_layer(tokens):
    before = map_tensors(Hadamard.random(256), lambda tensor: tensor.cuda())
    case = small(4)
    module = FactoredLinear(Product((case.operator, before))).to("cuda", BRAIN)
    x = inputs(tokens, 256, BRAIN)
    with torch.no_grad():
        close(module(x), x.double() @ (case.matrix @ before.to_dense().double()).T)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_chain_of_quantized_cores(tokens):
    terms = [rtn(torch.randn(12, 60, generator=torch.Generator().manual_seed(k)).cuda(), INT8) for k in (0, 1)]
    operator = Chain(tuple(terms), (1, 12, 1), (12, 6), (5, 10))
    module = FactoredLinear(operator).to("cuda", BRAIN)
    assert module.kernel == "chain", module.explain()
    x = inputs(tokens, 50, BRAIN)
    with torch.no_grad():
        close(module(x), x.double() @ operator.to_dense().double().T)


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(tokens):
    cases = [q_plus_lr(70, 256, 4, group=64, rank=(9, 0)[e % 2], dtype=BRAIN, seed=e) for e in range(EXPERTS)]
    s = Stacked.of([packed(case) for case in cases])
    x = inputs(tokens, 256, BRAIN)
    index = torch.randint(0, EXPERTS, (tokens, 2), generator=torch.Generator().manual_seed(tokens)).cuda()
    order, tiles = experts_row.route(index.flatten(), EXPERTS)
    y = experts_row.experts(x, index.flatten(), order, tiles, s.low, s.high, s.groups, s.left, s.right, s.firsts,
                            s.gain, s.ranks, s.bits, s.group, s.scale, s.table)  # fmt: skip
    wide = x.double().repeat_interleave(2, 0)
    exact = torch.stack([cases[e].matrix @ row for e, row in zip(index.flatten().tolist(), wide, strict=True)])
    close(y, exact)
    weights = torch.rand(tokens, 2, device="cuda").to(BRAIN)
    summed = (exact.view(tokens, 2, -1) * weights.double().unsqueeze(-1)).sum(1)
    close(experts_row.weighted_sum(y, weights, index, EXPERTS), summed, 4)
