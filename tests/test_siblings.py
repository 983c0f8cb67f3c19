"""Layers of one input: in any order, copied, edited, in threads, each answers what it would alone."""

import copy
import gc
import threading
import time
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_cases import q_plus_lr
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tnc.errors import ModelError
from tnc.formats import IntFormat
from tnc.kernels import Kernel, register_kernel, table
from tnc.kernels import qlr_cpu as row
from tnc.modules import FactoredLinear
from tnc.modules import siblings as module_siblings
from tnc.quant import rtn
from tnc.siblings import join_siblings, part_siblings, sibling_groups
from tnc.terms import Diagonal, Hadamard, LowRank, Product, Sum
from tnc.ties import share_tensors

COLUMNS = 256
NAMES = ("q", "k", "v")
FEW = settings(max_examples=max(settings.default.max_examples // 4, 10))
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cases lie on the GPU there")


@dataclass(frozen=True)
class Counted:
    """A kernel that answers for several operators in one launch, and counts its launches."""

    launches: list

    def __call__(self, x, tensors):
        self.launches.append(1)
        return (x @ tensors["right"].to(x.dtype).T) @ tensors["left"].to(x.dtype).T

    def alike(self, tensors):
        return tensors["right"].shape

    def right(self, tensors):
        return (tensors["right"],)

    def joint(self, x, others, tensors):
        if x.shape[0] > 8:
            return None
        self.launches.append(len(tensors))
        return [(x @ t["right"].to(x.dtype).T) @ t["left"].to(x.dtype).T for t in tensors]

    def describe(self):
        return "counted"


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The fused CPU row serves small layers; ``counted`` serves low rank where it is named. The list of launches."""
    monkeypatch.setattr(row, "LEAST", 1)
    monkeypatch.setattr(table, "_KERNELS", dict(table._KERNELS))
    module_siblings._THREAD.shared = None
    launches = []
    serves = lambda operator, device, dtype: None if isinstance(operator, LowRank) else "no"  # noqa: E731
    register_kernel(Kernel("counted", serves, lambda operator: Counted(launches), -1))
    yield launches
    module_siblings._THREAD.shared = None


class Block(nn.Module):
    def __init__(self, operators, backend="auto"):
        super().__init__()
        for name, operator in zip(NAMES, operators, strict=True):
            bias = torch.linspace(0, 1, operator.shape[0]) if name == "v" else None
            self.add_module(name, FactoredLinear(operator, bias, backend=backend))
        share_tensors([self.get_submodule(name) for name in NAMES], operators)
        join_siblings(self, [NAMES])

    def forward(self, x):
        return [self.get_submodule(name)(x) for name in NAMES]


def low_ranks(shared=True):
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(3, COLUMNS, generator=generator) / 16
    rights = [right if shared else right + k for k in range(3)]
    return [LowRank(torch.randn(m, 3, generator=generator), r) for m, r in zip((32, 16, 16), rights, strict=True)]


def quantized(shared=True, rank=3):
    bases = [q_plus_lr(m, COLUMNS, 4, group=64, rank=None, seed=m + i).operator for i, m in enumerate((32, 16, 16))]
    factors = low_ranks(shared)
    return [Sum((base, term)) for base, term in zip(bases, factors, strict=True)] if rank else bases


def rotated(operators, seeds=(0, 0, 0)):
    return [Product((each, Hadamard.random(COLUMNS, seed=seed))) for each, seed in zip(operators, seeds, strict=True)]


def quantized_factors():
    format = IntFormat(6)
    right = rtn(low_ranks()[0].right, format)
    return [Sum((base, Product((rtn(term.left, format), right))))
            for base, term in zip(quantized(rank=0), low_ranks(), strict=True)]  # fmt: skip


GROUPS = {
    "R x": (quantized, "once for all: R x"),
    "rotation and R x": (lambda: rotated(quantized()), "once for all: fast hadamard, R x"),
    "rotation": (lambda: rotated(quantized(shared=False)), "once for all: fast hadamard"),
    "low rank": (low_ranks, "once for all: R x"),
    "both sides": (
        lambda: [Product((Hadamard.random(each.shape[0], seed=1), each)) for each in rotated(quantized())],
        "once for all: fast hadamard, R x",
    ),
    "quantized factors": (quantized_factors, "once for all: R x"),
    "one launch": (low_ranks, "once for all: one launch"),
}


def block_of(name):
    return Block(GROUPS[name][0](), backend="counted" if name == "one launch" else "auto")


def alone(layer, x):
    y = layer._kernel(x, layer._tensors())
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def agree(y, exact):
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_what_is_shared_and_said(name, tokens):
    block = block_of(name)
    x = torch.randn(2, tokens, COLUMNS)
    with torch.no_grad():
        for y, layer in zip(block(x), block.children(), strict=True):
            agree(y, alone(layer, x))
            assert y.is_contiguous()
    assert block.k.explain().endswith(f"one input for q, k, v: {GROUPS[name][1]}")
    assert module_siblings._THREAD.shared is None, "taken by all"


EDITS = ("in place", "data", "new", "load", "move")
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from(NAMES), st.integers(0, 1)),
        st.tuples(st.just("edit x"), st.sampled_from(("add", "data", "view", "resize")), st.integers(0, 1)),
        st.tuples(st.just("edit layer"), st.sampled_from(NAMES), st.sampled_from(EDITS)),
        st.tuples(st.just("new x"), st.integers(1, 3), st.integers(0, 1)),
        st.tuples(st.just("fail"), st.sampled_from(NAMES), st.integers(0, 1)),
        st.tuples(st.just("copy"), st.just(""), st.just(0)),
        st.tuples(st.just("other mode"), st.sampled_from(("grad", "inference")), st.sampled_from(NAMES)),
    ),
    max_size=14,
)  # fmt: skip


@given(name=st.sampled_from(tuple(GROUPS)), actions=ACTIONS)
@settings(max_examples=settings.default.max_examples)
def test_no_sequence_of_calls_and_edits_gives_a_stale_answer(name, actions):
    torch.manual_seed(0)
    block, xs = block_of(name), [torch.randn(2, COLUMNS), torch.randn(1, 3, COLUMNS)]
    with torch.no_grad():
        for action, what, which in actions:
            if action == "call":
                layer = block.get_submodule(what)
                agree(layer(xs[which]), alone(layer, xs[which]))
            elif action == "edit x":
                edit_input(xs, what, which)
            elif action == "new x":
                xs[which] = torch.randn(what, COLUMNS)
            elif action == "edit layer":
                edit_layer(block.get_submodule(what), which)
            elif action == "copy":
                block = copy.deepcopy(block)
            elif action == "fail":
                fail(block.get_submodule(what), xs[which])
            else:
                layer, x = block.get_submodule(which), xs[0]
                with torch.enable_grad() if what == "grad" else torch.inference_mode():
                    agree(layer(x), alone(layer, x))


def edit_input(xs, how, which):
    if how == "add":
        xs[which].add_(1)
    elif how == "data":
        xs[which].data = xs[which] * 2
    elif how == "view":
        xs[which].view(-1)[::3].mul_(-1)
    else:
        xs[which].resize_(1, COLUMNS).fill_(0.5)


def edit_layer(layer, how):
    """Training, loading, new parameters; factors that siblings share change for all of them."""
    named = {name: parameter for name, parameter in layer.named_parameters() if "left" in name or "right" in name}
    for name, parameter in named.items():
        if how == "in place":
            parameter.mul_(1.5)
        elif how == "data":
            parameter.data = parameter.data + 0.25
        elif how == "new":
            setattr(layer, name, nn.Parameter(parameter - 0.5))
    if how == "load":
        layer.load_state_dict({name: t / 2 if t.is_floating_point() else t for name, t in layer.state_dict().items()})
    elif how == "move":
        layer.double().float()


def fail(layer, x):
    """An error in the middle of a call, before and after the layer ran."""
    for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
        handle = register(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            layer(x)
        handle.remove()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("how", EDITS)
def test_an_edited_layer_gives_what_it_now_holds(name, how):
    block, x = block_of(name), torch.randn(2, COLUMNS)
    with torch.no_grad():
        for first, second in (("q", "k"), ("v", "q")):
            before = block.get_submodule(first)(x)
            old = alone(block.get_submodule(second), x)
            edit_layer(block.get_submodule(second), how)
            y = block.get_submodule(second)(x)
            agree(y, alone(block.get_submodule(second), x))
            shows = how == "load" or (how != "move" and name != "quantized factors")
            assert torch.allclose(y, old, rtol=1e-4, atol=1e-4) != shows
            assert before.shape != y.shape or before is not y


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("how", ["add", "data", "view", "resize"])
def test_an_edited_input_gives_fresh_answers(name, how):
    block, xs = block_of(name), [torch.randn(2, COLUMNS)]
    with torch.no_grad():
        block.q(xs[0])
        edit_input(xs, how, 0)
        for layer in (block.k, block.v):
            agree(layer(xs[0]), alone(layer, xs[0]))


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_take_turns_and_replicas_keep_apart(name):
    blocks, x = [block_of(name) for _ in range(2)], torch.randn(2, COLUMNS)
    edit_layer(blocks[1].k, "data")
    replica = blocks[0].k._replicate_for_data_parallel()
    replica._parameters = {each: 2 * t.detach() for each, t in blocks[0].k._parameters.items() if t is not None}
    replica._parameters.setdefault("bias", None)
    with torch.no_grad():
        for layer in (*blocks[0].children(), *blocks[1].children(), blocks[1].k, blocks[0].k, blocks[0].q, replica):
            agree(layer(x), alone(layer, x))
        blocks[0].q(x)
        assert torch.equal(replica(x), alone(replica, x))
        agree(blocks[0].k(x.clone()), alone(blocks[0].k, x))
        blocks[0].q(x)
        equal = x.view(2, COLUMNS)  # the same memory, another tensor
        agree(blocks[0].k(equal), alone(blocks[0].k, x))


def test_another_kernel_is_another_plan(monkeypatch):
    block, x = block_of("R x"), torch.randn(2, COLUMNS)
    with torch.no_grad():
        block(x)
        monkeypatch.setattr(row, "LEAST", 2**30)
        for layer in block.children():
            layer.double().float()
            assert layer.kernel == "einsum"
        for y, layer in zip(block(x), block.children(), strict=True):
            agree(y, alone(layer, x))
    assert block.q.explain().endswith("once for all: R x")


@pytest.mark.parametrize("order", [("q", "k", "v"), ("v", "q", "k"), ("k", "k", "q", "v")])
def test_one_launch_serves_each_layer_once(counted, order):
    block, x = block_of("one launch"), torch.randn(2, COLUMNS)
    with torch.no_grad():
        for name in order:
            block.get_submodule(name)(x)
    assert counted == [3] * (len(order) - 2), "k twice: the second call computes afresh"
    counted.clear()
    with torch.no_grad():
        block(torch.randn(9, COLUMNS))
    assert counted == [1, 1, 1], "more tokens than one launch takes"


@pytest.mark.parametrize(
    "mode", ["grad", "inference", "subclass", "dispatch mode", "vmap", "autocast between", "parted"]
)
def test_where_layers_run_apart(counted, mode):
    block, x = block_of("one launch"), torch.randn(2, COLUMNS)

    class Own(torch.Tensor):
        pass

    if mode == "parted":
        part_siblings(block)
        assert sibling_groups(block) == []
    if mode == "grad":
        sum(y.sum() for y in block(x)).backward()
        assert block.get_parameter("q.left").grad is not None
    elif mode == "inference":
        with torch.inference_mode():
            block(x.clone())
    elif mode == "vmap":
        with torch.no_grad():
            torch.vmap(lambda each: tuple(block(each)))(x.unsqueeze(1))
    elif mode == "dispatch mode":
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(x)
        assert counter.get_total_flops() > 0
    elif mode == "autocast between":
        with torch.no_grad():
            block.q(x)
            with torch.autocast("cpu", torch.bfloat16):
                agree(block.k(x).float(), alone(block.k, x.bfloat16()).float())
                counted.clear()
                block(x)  # a tensor of their own for every layer
                assert counted == [1, 1, 1]
                block(x.bfloat16())
        assert counted == [1, 1, 1, 3]
        return
    else:
        with torch.no_grad():
            block(x.as_subclass(Own) if mode == "subclass" else x)
    assert counted == [1, 1, 1]


@pytest.mark.parametrize("name", ["rotation and R x", "one launch"])
def test_threads_do_not_mix(name):
    block = block_of(name)
    xs = [torch.randn(2, COLUMNS) for _ in range(4)]
    with torch.no_grad():
        expected = [[alone(layer, x) for layer in block.children()] for x in xs]
    common, wrong = torch.randn(2, COLUMNS), []
    for_all = [alone(layer, common) for layer in block.children()]
    barrier = threading.Barrier(len(xs))

    def work(i):
        with torch.no_grad():
            barrier.wait()
            for _ in range(30):
                for x, wanted in ((xs[i], expected[i]), (common, for_all)):
                    block.q(x)
                    time.sleep(1e-4)  # the others come in between
                    if module_siblings._THREAD.shared._x() is not x:
                        wrong.append(i)
                    if not all(torch.allclose(y, e, atol=1e-4) for y, e in zip(block(x), wanted, strict=True)):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_held_longer_than_x(counted):
    block, x = block_of("one launch"), torch.randn(2, COLUMNS)
    with torch.no_grad():
        block.q(x)
    shared = module_siblings._THREAD.shared
    held = weakref.ref(shared._started)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None and held() is None
    other = torch.randn(2, COLUMNS)
    with torch.no_grad():
        block.q(other)
        kept = weakref.ref(module_siblings._THREAD.shared)
        another = block_of("R x")
        another.q(torch.randn(1, COLUMNS))
    gc.collect()
    assert kept() is None or kept()._started is None, "another group computed"


def test_answers_nobody_asks_for_switch_the_group_off(counted):
    block = block_of("one launch")
    with torch.no_grad():
        for _ in range(module_siblings.PATIENCE - 1):
            block.q(torch.randn(1, COLUMNS))
        block(torch.randn(1, COLUMNS))
        assert block.q.siblings.active, "all were asked for: counted from the start"
        for _ in range(module_siblings.PATIENCE):
            block.q(torch.randn(1, COLUMNS))
        counted.clear()
        block(torch.randn(1, COLUMNS))
    assert counted == [1, 1, 1] and not block.q.siblings.active
    assert block.q.explain().endswith("switched off, or not all were asked for: they run apart")
    kept, watched = [torch.randn(1, COLUMNS) for _ in range(module_siblings.PATIENCE + 1)], block_of("one launch")
    with torch.no_grad():
        for x in kept:
            watched.q(x)
    assert not watched.q.siblings.active, "inputs that live on count too"
    calm = block_of("R x")
    with torch.no_grad():
        for _ in range(2 * module_siblings.PATIENCE):
            calm.q(torch.randn(1, COLUMNS))
    assert calm.q.siblings.active, "R x alone costs nothing"


def test_copies_are_groups_of_their_own(counted, tmp_path):
    block, x = block_of("one launch"), torch.randn(2, COLUMNS)
    torch.save(block, tmp_path / "block.pt")
    loaded = torch.load(tmp_path / "block.pt", weights_only=False)
    for other in (copy.deepcopy(block), loaded, copy.deepcopy(block).double().float()):
        assert other.q.siblings is not block.q.siblings and other.q.siblings is other.v.siblings
        with torch.no_grad():
            block(x)
            mine = counted.copy()
            counted.clear()
            other(x)
        assert mine and mine[-1] == 3
    lonely, shallow = copy.deepcopy(block.q), copy.copy(block.q)
    counted.clear()
    with torch.no_grad():
        agree(lonely(x), alone(block.q, x))
        agree(shallow(x), alone(block.q, x))
        counted.clear()
        block(x)
    assert counted == [3], "the copies took nobody's place"
    assert "they run apart" in lonely.explain()
    assert set(block.state_dict()) == {"q.left", "q.right", "k.left", "k.right", "v.left", "v.right", "v.bias"}


def test_unlike_operators_go_in_no_common_launch(counted):
    operators = low_ranks()
    operators[1] = LowRank(torch.randn(16, 2), torch.randn(2, COLUMNS))
    block = Block(operators, backend="counted")
    with torch.no_grad():
        block(torch.randn(2, COLUMNS))
    assert counted == [1, 1, 1] and block.q.explain().endswith("nothing in common: they run apart")


def test_rotations_that_differ_are_not_common():
    block = Block(rotated(quantized(shared=False), seeds=(0, 1, 0)))
    assert block.q.explain().endswith("nothing in common: they run apart")
    block = Block(rotated(quantized(shared=False)))
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        block(x)
        block.k.get_buffer("1_signs").bitwise_xor_(255)  # an edit that torch counts
        for y, layer in zip(block(x), block.children(), strict=True):
            agree(y, alone(layer, x))
        assert block.q.explain().endswith("nothing in common: they run apart")
    turned = rotated(quantized(shared=False))
    turned[1] = Product((turned[1].terms[0], turned[1].terms[1].inverse()))
    assert Block(turned).q.explain().endswith("nothing in common: they run apart")
    mixed = [Product((each, Diagonal(torch.ones(COLUMNS)))) for each in quantized(shared=False)]
    mixed[1] = Product((mixed[1].terms[0], Diagonal(torch.full((COLUMNS,), 2.0))))
    assert Block(mixed).q.explain().endswith("nothing in common: they run apart")


def test_compiled_and_exported_layers_run_apart_in_one_graph():
    block, x = block_of("rotation and R x"), torch.randn(2, COLUMNS)
    with torch.no_grad():
        expected = block(x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for y, e in zip(compiled(x), expected, strict=True):
            agree(y, e)
        for y, e in zip(torch.export.export(block, (x,)).module()(x), expected, strict=True):
            agree(y, e)
        block.q(x)  # something is held while tracing
        for y, e in zip(torch.jit.trace(block, (x,), check_trace=False)(2 * x), block(2 * x), strict=True):
            agree(y, e)


def test_names_that_are_no_layers_are_refused():
    block = Block(low_ranks())
    for names, message in (
        (("q", "w"), "join_siblings got 'w', which is nothing; expected the name of a FactoredLinear layer"),
        (("q", "q"), "got q more than once; expected each layer in one group"),
    ):
        with pytest.raises(ModelError, match=message):
            join_siblings(block, [names])
    block.add_module("plain", nn.Linear(2, 2))
    with pytest.raises(ModelError, match="which is Linear; expected the name"):
        join_siblings(block, [("q", "plain")])
    with pytest.raises(ModelError, match="got k more than once; expected each layer in one group"):
        join_siblings(block, [("q", "k"), ("k", "v")])
    join_siblings(block, [("q",)])
    assert sibling_groups(block) == [["q", "k", "v"]]
