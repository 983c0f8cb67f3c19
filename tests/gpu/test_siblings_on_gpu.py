"""Layers of one input on a CUDA device: one launch, graphs, streams, threads, a second GPU, the same in every run."""

import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from kernels.triton_cases import ROUNDING, inputs, q_plus_lr

from tnc.kernels import qlr_ops
from tnc.kernels.qlr_launch import tile
from tnc.modules import FactoredLinear
from tnc.siblings import join_siblings
from tnc.terms import Hadamard, LowRank, Product, Sum, map_tensors
from tnc.ties import share_tensors

BRAIN = torch.bfloat16
COLUMNS = 2048
NAMES = ("q", "k", "v")


class Block(nn.Module):
    def __init__(self, shared=True, rotated=False, bits=4, joined=True):
        super().__init__()
        cases = [q_plus_lr(m, COLUMNS, bits, group=128, rank=64, dtype=BRAIN, seed=m + i)
                 for i, m in enumerate((1000, 256, 256))]  # fmt: skip
        operators = [map_tensors(case.operator, torch.Tensor.cpu) for case in cases]
        if shared:
            right = operators[0].terms[1].right
            operators = [Sum((each.terms[0], LowRank(each.terms[1].left, right))) for each in operators]
        if rotated:
            operators = [Product((each, Hadamard.random(COLUMNS))) for each in operators]
        for name, operator in zip(NAMES, operators, strict=True):
            self.add_module(name, FactoredLinear(operator))
        share_tensors(list(self.children()), operators)
        if joined:
            join_siblings(self, [NAMES])

    def forward(self, x):
        return [self.get_submodule(name)(x) for name in NAMES]


@pytest.fixture
def launches(monkeypatch):
    """How many operators each fused launch served."""
    seen = []
    for name in ("vector", "tile"):
        real = getattr(qlr_ops, name)
        counted = lambda x, *packs, real=real, **how: seen.append(len(packs)) or real(x, *packs, **how)  # noqa: E731
        monkeypatch.setattr(qlr_ops, name, counted)
    return seen


def alone(layer, x):
    return layer._kernel(x, layer._tensors())


def close(y, exact, x):
    assert (y.double() - exact.double()).norm() <= 4 * ROUNDING[BRAIN] * exact.double().norm()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 5, 32, 64, 200])
def test_one_launch_gives_what_each_gives_alone(shared, rotated, tokens, launches):
    block = Block(shared, rotated).to("cuda", BRAIN)
    with torch.no_grad():
        for seed in range(20):
            x = inputs(tokens, COLUMNS, BRAIN, seed=seed)
            launches.clear()
            found = block(x)
            assert launches == ([3] if tokens <= 32 else [1, 1, 1] if tokens <= 64 else [])
            for y, again, layer in zip(found, block(x), block.children(), strict=True):
                assert torch.equal(y, again) and y.is_contiguous()
                close(y, alone(layer, x), x)
    said = block.q.explain().splitlines()[-1]
    assert said == f"  one input for q, k, v: once for all: {'fast hadamard, ' if rotated else ''}one launch"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [33, 64])
def test_several_factors_in_a_tall_tile(shared, tokens):
    """Modules do not ask for it: t was zero here before the first product stood apart."""
    block = Block(shared).to("cuda", BRAIN)
    held = [layer.bound() for layer in block.children()]
    packs = [kernel.packed(tensors) for kernel, tensors in held]
    if shared:
        packs = [replace(each, right=packs[0].right) for each in packs]
    for seed in range(20):
        x = inputs(tokens, COLUMNS, BRAIN, seed=seed)
        parts = tile(x, *packs).flatten().split([tokens * each.shape[0] for each in packs])
        for y, layer in zip(parts, block.children(), strict=True):
            close(y.view(tokens, -1), alone(layer, x), x)


def warmed(block, x):
    with torch.cuda.stream(torch.cuda.Stream()):
        block(x)
        for layer in block.children():
            alone(layer, x)
    torch.cuda.synchronize()


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_captured_graph_holds_one_launch_and_follows_its_inputs(rotated, tokens, launches):
    block, x = Block(rotated=rotated).to("cuda", BRAIN), inputs(tokens, COLUMNS, BRAIN)
    with torch.no_grad():
        warmed(block, x)
        launches.clear()
        graph, found = captured(lambda: block(x))
        assert launches == [3]
        for seed in range(20):
            x.copy_(inputs(tokens, COLUMNS, BRAIN, seed=seed))
            graph.replay()
            for y, wanted in zip(found, block(x), strict=True):
                assert torch.equal(y, wanted)


def test_nothing_crosses_into_a_graph_or_out_of_it_or_into_the_next():
    block, x = Block().to("cuda", BRAIN), inputs(1, COLUMNS, BRAIN)
    with torch.no_grad():
        warmed(block, x)
        block.q(x)  # k is ready, outside of a graph
        first, k = captured(lambda: block.k(x))  # and so is v, inside of this one
        second, v = captured(lambda: block.v(x))
        before = [block.q(x)]
        for seed in range(5):
            x.copy_(inputs(1, COLUMNS, BRAIN, seed=seed))
            first.replay()
            second.replay()
            close(k, alone(block.k, x), x)
            close(v, alone(block.v, x), x)
        close(block.v(x), alone(block.v, x), x)
        assert not torch.equal(before[0], block.q(x))


def test_streams_and_threads_do_not_mix():
    block = Block(rotated=True).to("cuda", BRAIN)
    xs = [inputs(1, COLUMNS, BRAIN, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [block(x) for x in xs]
        torch.cuda.synchronize()
        for _ in range(20):  # each layer of a group on a stream of its own
            found = []
            for layer in block.children():
                with torch.cuda.stream(torch.cuda.Stream()):
                    found.append(layer(xs[0]))
            torch.cuda.synchronize()
            for y, wanted in zip(found, expected[0], strict=True):
                close(y, wanted, xs[0])
    wrong = []

    def work(i):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                found = block(xs[i])
                torch.cuda.current_stream().synchronize()
                wrong.extend(i for y, e in zip(found, expected[i], strict=True) if not torch.equal(y, e))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


RUN = """
import hashlib, torch
from gpu.test_siblings_on_gpu import digest
torch.use_deterministic_algorithms({strict})
print(digest())
"""


def digest():
    """A fingerprint of answers and gradients of all sorts of layers."""
    torch.manual_seed(0)
    found = hashlib.sha256()
    for rotated in (False, True):
        block = Block(rotated=rotated).to("cuda", BRAIN)
        for tokens in (1, 2, 16, 64, 200):
            x = inputs(tokens, COLUMNS, BRAIN, seed=tokens)
            with torch.no_grad():
                answers = block(x)
            x.requires_grad_()
            sum(y.float().square().sum() for y in block(x)).backward()
            grads = [x.grad, *(p.grad for p in block.parameters())]
            for tensor in (*answers, *grads):
                found.update(tensor.detach().contiguous().view(torch.int16).cpu().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("strict", [False, True])
def test_every_run_gives_the_same_bits(strict):
    """Parts are added in a fixed order; nothing has to be switched on, and the strict mode of torch finds nothing."""
    code = RUN.format(strict=strict)
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=place)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr[-2000:]
    assert runs[0].stdout == runs[1].stdout != ""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_second_gpu_runs_siblings_whatever_the_current_device(current, rotated):
    here, there = Block(rotated=rotated).to("cuda:0", BRAIN), Block(rotated=rotated).to("cuda:1", BRAIN)
    with torch.no_grad(), torch.cuda.device(current):
        for tokens in (1, 2, 16, 64, 200):
            x = inputs(tokens, COLUMNS, BRAIN, seed=tokens).to("cuda:0")
            for y, wanted in zip(there(x.to("cuda:1")), here(x), strict=True):
                assert y.device.index == 1 and torch.equal(y.to("cuda:0"), wanted)
    moved = there.to("cuda:0")
    x = inputs(1, COLUMNS, BRAIN).to("cuda:0")
    with torch.no_grad():
        assert all(torch.equal(y, wanted) for y, wanted in zip(moved(x), here(x), strict=True))
