"""Rotations, scalings and orders of x in the launch of Q + L R on a CUDA device: what the interpreter cannot show."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from kernels.test_triton_change import agrees, change_of, exact_of, one, order, packed_of, rotation, scaling
from kernels.triton_cases import inputs, q_plus_lr

HALF, BRAIN = torch.float16, torch.bfloat16
FORMS = {
    "rotated": lambda n: (rotation(n),),
    "all inverse": lambda n: (order(n), scaling(n, BRAIN), rotation(n, inverse=True)),
    "ordered": lambda n: (order(n),),
}


@pytest.mark.parametrize("tokens", [1, 2, 16, 32])
@pytest.mark.parametrize(
    ("columns", "bits", "rank", "form"),
    [(2048, 4, 64, "rotated"), (11008, 3, 40, "rotated"), (14336, 4, 0, "all inverse"), (1376, 2, 9, "ordered")],
)
def test_fresh_inputs_agree_with_float64_and_with_a_second_run(columns, bits, rank, tokens, form):
    dtype = HALF if columns == 2048 else BRAIN
    case = q_plus_lr(300, columns, bits, group=columns if columns % 128 else 128, rank=rank, scale=dtype, dtype=dtype)
    terms, packed = FORMS[form](columns), packed_of(case)
    change = change_of(*terms)
    for seed in range(50):
        x = inputs(tokens, columns, dtype, seed=seed)
        y = one(x, change, packed)
        agrees(y, exact_of(terms, case, x), dtype)
        assert torch.equal(y, one(x, change, packed))


@pytest.mark.parametrize("tokens", [1, 16])
def test_graphs_replay_and_streams_do_not_meet(tokens):
    case, terms = q_plus_lr(1000, 2048, 4, group=128, rank=64, dtype=BRAIN), FORMS["rotated"](2048)
    packed, change = packed_of(case), change_of(*terms)
    x = inputs(tokens, 2048, BRAIN)
    one(x, change, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [one(x, change, packed) for _ in range(3)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    for seed in range(50):
        x.copy_(inputs(tokens, 2048, BRAIN, seed=seed))
        torch.cuda.synchronize()
        graph.replay()
        beside = []
        for stream in streams:
            with torch.cuda.stream(stream):
                beside.append(one(x, change, packed))
        torch.cuda.synchronize()
        alone = one(x, change, packed)
        agrees(alone, exact_of(terms, case, x), BRAIN)
        assert all(torch.equal(y, alone) for y in (*found, *beside))
