"""The planned contraction of matrix product operators: every way computes the same map, within the memory limit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc import FactoredLinear
from tnc.errors import BackendError, BudgetError
from tnc.kernels import choose, mpo_prices
from tnc.kernels.costs import Costs, costs_of
from tnc.kernels.kept import KEPT, KeptWeights
from tnc.kernels.mpo import plan_mpo
from tnc.kernels.mpo_prices import candidates
from tnc.kernels.mpo_ways import Keep, Path, Rebuild, Sweep
from tnc.networks import balanced_modes
from tnc.terms import Dense, LowRank, Mpo, Sum, cast, dense64
from tnc.testing import mpos

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    KEPT.allow()
    yield
    KEPT.allow()


FEW = settings(max_examples=max(settings.default.max_examples // 4, 10))


def operator(rows, columns, d, rank, *, dtype=torch.float32, features=None):
    generator = torch.Generator().manual_seed(0)
    ranks = [1, *[rank] * (d - 1), 1]
    modes = zip(balanced_modes(rows, d), balanced_modes(columns, d)[::-1], strict=True)
    sizes = [(ranks[k], o, i, ranks[k + 1]) for k, (o, i) in enumerate(modes)]
    cores = tuple((torch.randn(size, generator=generator) / size[0] ** 0.5).to(dtype) for size in sizes)
    return Mpo(cores, features)


@given(a=mpos(), tokens=st.sampled_from((0, 1, 2, 3, 17)), dtype=st.sampled_from((torch.float64, torch.float32)))
@FEW
def test_every_candidate_computes_the_same_map(a, tokens, dtype):
    if len(a.cores) < 2:
        return
    a = cast(a, dtype)
    x = torch.randn(tokens, a.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = x @ dense64(a).T
    found = candidates(a, "", max(tokens, 1))
    assert {type(plan) for plan in found} >= {Sweep, Rebuild}
    scale = float(expected.abs().max()) if tokens else 1.0
    for plan in found:
        y = plan(x.to(dtype), a.tensors())
        assert y.dtype == dtype
        assert y.shape == (tokens, a.shape[0])
        tolerance = {"rtol": 0, "atol": (1e-11 if dtype == torch.float64 else 1e-4) * max(scale, 1.0)}
        torch.testing.assert_close(y.double(), expected, **tolerance)
        assert plan.seconds > 0
        assert plan.describe()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_their_dtype(dtype):
    a = operator(24, 30, 3, 4)
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ dense64(a).T
    for plan in candidates(a, "", 5):
        y = plan(x, a.tensors())
        assert y.dtype == dtype
        assert float((y.double() - expected).abs().max()) <= 0.03 * float(expected.abs().max())


def test_the_gradient_reaches_cores_and_input():
    a = cast(operator(6, 8, 3, 2), torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    cores = [core.requires_grad_() for core in a.cores]
    for plan in candidates(a, "", 3):
        call = lambda x, *cores, plan=plan: plan(x, {f"core{k}": core for k, core in enumerate(cores)})  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, *cores))


def test_the_choice_depends_on_tokens_and_is_explained():
    module = FactoredLinear(operator(1024, 1024, 2, 48))
    text = module.explain()
    assert "mpo: chosen" in text
    assert "up to 2 tokens: sweep" in text
    assert "no permutation" in text
    assert "keeps the dense weight where there is room (one a process by default), else sweep" in text
    assert "rebuilds the weight in blocks" in text


def test_predicted_times_decide_not_flops():
    a = operator(1024, 1024, 2, 32)
    found = candidates(a, "", 4096)
    chosen = plan_mpo(a, "", 4096)
    assert chosen.seconds == min(plan.seconds for plan in found)
    dear = operator(512, 512, 3, 16)
    ways = [[p for p in candidates(dear, "", 2**k) if not isinstance(p, Keep)] for k in range(11)]
    assert any(min(w, key=lambda p: p.seconds).flops > min(p.flops for p in w) for w in ways)


def test_the_largest_intermediate_respects_the_limit(monkeypatch):
    a = operator(256, 256, 2, 16)
    tokens = 512
    x = torch.randn(tokens, 256)

    def largest(plan):
        sizes = []
        with Spy(sizes):
            plan(x, a.tensors())
        return max(sizes)

    limit = 2**20
    monkeypatch.setattr(mpo_prices, "MEMORY_LIMIT", limit)
    assert all(largest(plan) <= limit for plan in candidates(a, "", tokens))
    assert any(isinstance(plan, Sweep) and plan.slice for plan in candidates(a, "", tokens))


class Spy(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the bytes of every tensor that an operation makes."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.append(result.numel() * result.element_size())
        return result


def test_a_rebuild_never_holds_the_whole_weight():
    a = operator(512, 512, 2, 4)
    plan = next(plan for plan in candidates(a, "", 4) if isinstance(plan, Rebuild))
    blocks = Rebuild(plan.names, 1, 2, plan.features, 0.0, 0.0)
    sizes = []
    with Spy(sizes):
        blocks(torch.randn(4, 512), a.tensors())
    assert max(sizes) < 512 * 512 * 4 / 4


def keep_of(a, tokens):
    found = candidates(a, "", tokens)
    rebuild = next(plan for plan in found if isinstance(plan, Rebuild))
    other = next(plan for plan in found if isinstance(plan, Sweep))
    return Keep(rebuild, other, 0.0, 0.0)


def agrees(plan, a, x):
    torch.testing.assert_close(plan(x, a.tensors()), x @ a.to_dense().T.to(x.dtype), rtol=1e-4, atol=1e-4)


@given(a=mpos(), data=st.data())
@FEW
def test_a_kept_weight_computes_the_same_map(a, data):
    if len(a.cores) < 2:
        return
    a = cast(a, torch.float64)
    plan = keep_of(a, 3)
    x = torch.randn(3, a.shape[1], dtype=torch.float64)
    expected = x @ dense64(a).T
    KEPT.release()
    for rebuild in (plan.rebuild, *(p for p in candidates(a, "", 3) if isinstance(p, Rebuild))):
        KEPT.release()
        again = Keep(rebuild, plan.other, 0.0, 0.0)
        for _ in range(2):
            torch.testing.assert_close(
                again(x, a.tensors()), expected, rtol=0, atol=1e-10 * max(float(expected.abs().max()), 1)
            )


def test_one_weight_is_kept_and_used_again(monkeypatch):
    a, b = operator(24, 30, 3, 4), operator(20, 30, 2, 3)
    x = torch.randn(5, 30)
    built = []
    original = Rebuild.weight
    monkeypatch.setattr(Rebuild, "weight", lambda self, *args: built.append(self) or original(self, *args))
    first, second = keep_of(a, 5), keep_of(b, 5)
    for _ in range(3):
        agrees(first, a, x)
        agrees(second, b, x)
    assert built == [first.rebuild]
    tensors = a.tensors()
    del a
    agrees(second, b, x)
    assert built == [first.rebuild]
    del tensors
    agrees(second, b, x)
    assert built == [first.rebuild, second.rebuild]


def asked(room, owner, gain, *, size=10, built=None):
    """Whether a weight of ``size`` numbers is kept for an operator of one core; notes when it is built."""

    def build():
        if built is not None:
            built.append(owner)
        return torch.zeros(size)

    return room.weight([owner], torch.float32, build, nbytes=4 * size, gain=gain) is not None


def test_the_room_goes_to_the_first_and_then_to_what_gains_more():
    room, built = KeptWeights(), []
    a, b, c = (torch.full((2, 2), float(k)) for k in range(3))
    assert asked(room, a, 1.0, built=built) and not asked(room, b, 1.2, built=built)
    assert asked(room, b, 1.3, built=built) and not asked(room, a, 1.0, built=built)
    assert asked(room, b, 0.1, built=built), "what a weight has gained once counts"
    assert not asked(room, c, 1.5, built=built) and built == [a, b]
    room.allow(weights=2)
    assert asked(room, a, 1.0) and asked(room, b, 2.0) and asked(room, c, 1.5) and not asked(room, a, 1.0)
    assert asked(room, b, 2.0) and asked(room, c, 1.5)
    assert not asked(room, a, 3.0, size=2**26), "gains enough for one of them, not for all that would have to go"


def test_the_room_is_counted_in_bytes_of_what_lives():
    room = KeptWeights()
    room.allow(weights=None, nbytes=100)
    owners = [torch.full((2, 2), float(k)) for k in range(3)]
    assert asked(room, owners[0], 1.0) and asked(room, owners[1], 1.0) and not asked(room, owners[2], 1.0)
    del owners[0]
    assert asked(room, owners[1], 1.0)
    room.allow(weights=0)
    assert not asked(room, owners[0], 1.0)
    with pytest.raises(BudgetError, match=r"weights=-1, nbytes=5\); expected no negative number"):
        room.allow(weights=-1, nbytes=5)


def test_with_room_every_operator_keeps_its_weight(monkeypatch):
    a, b = operator(24, 30, 3, 4), operator(20, 30, 2, 3)
    x, built, original = torch.randn(5, 30), [], Rebuild.weight
    monkeypatch.setattr(Rebuild, "weight", lambda self, *args: built.append(self) or original(self, *args))
    first, second = keep_of(a, 5), keep_of(b, 5)
    KEPT.allow(weights=None)
    for _ in range(3):
        agrees(first, a, x)
        agrees(second, b, x)
    assert built == [first.rebuild, second.rebuild]


@pytest.mark.parametrize("core", range(3))
def test_an_edit_of_a_core_is_seen_however_it_is_done(core):
    a = operator(24, 30, 3, 4)
    x = torch.randn(5, 30)
    plan = keep_of(a, 5)
    agrees(plan, a, x)
    a.cores[core].data[..., 0] += 1e-3
    agrees(plan, a, x)
    a.cores[core].data.copy_(a.cores[core].flip(1))
    agrees(plan, a, x)
    a.cores[core].data.copy_(a.cores[core].flip(2))
    agrees(plan, a, x)
    assert plan(x.double(), a.tensors()).dtype == torch.float64


def test_trained_cores_are_never_kept():
    a = cast(operator(6, 8, 3, 2), torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    plan = keep_of(a, 3)
    cores = [core.requires_grad_() for core in a.cores]
    call = lambda x, *cores: plan(x, {f"core{k}": core for k, core in enumerate(cores)})  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *cores))
    with torch.no_grad():
        agrees(plan, a, x)
    for core in cores:
        core.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x: call(x, *cores), (x,))


def test_a_kept_weight_is_made_without_a_second_one():
    a = operator(512, 512, 2, 4)
    plan = keep_of(a, 4)
    plan = Keep(Rebuild(plan.rebuild.names, 1, 2, (512, 512), 0.0, 0.0), plan.other, 0.0, 0.0)
    sizes = []
    with Spy(sizes):
        plan(torch.randn(4, 512), a.tensors())
    assert sum(size >= 512 * 512 * 4 / 4 for size in sizes if size != 512 * 512 * 4) == 0


def test_a_sum_plans_its_terms_apart():
    a = operator(24, 30, 2, 3)
    total = Sum((a, LowRank(torch.randn(24, 2), torch.randn(2, 30))))
    bound, report = choose(total, CPU, torch.float32)
    assert next(c.name for c in report if c.chosen) == "mpo"
    x = torch.randn(2, 3, 30)
    torch.testing.assert_close(bound(x, total.tensors()), total.linear(x), rtol=1e-4, atol=1e-4)
    assert isinstance(plan_mpo(a, "0.", 3), Sweep | Path | Rebuild | Keep)


def test_padding_is_cut_and_added():
    a = operator(16, 16, 2, 3, features=(13, 11))
    bound, _ = choose(a, CPU, torch.float32)
    for tokens in (1, 40):
        x = torch.randn(tokens, 11)
        torch.testing.assert_close(bound(x, a.tensors()), x @ a.to_dense().T, rtol=1e-4, atol=1e-4)


def test_compile_and_export_hold():
    a = operator(24, 30, 2, 3)
    module = FactoredLinear(a)
    x = torch.randn(5, 30)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_other_operators_are_refused_with_the_reason():
    for other in (Dense(torch.ones(3, 5)), operator(4, 6, 1, 1), Mpo((torch.ones(1, 2, 2, 0), torch.ones(0, 2, 2, 1)))):
        with pytest.raises(BackendError, match="two cores or more"):
            choose(other, CPU, torch.float32, backend="mpo")


def test_costs_grow_with_the_work():
    costs = costs_of(CPU, torch.float32)
    assert isinstance(costs, Costs)
    assert costs.product(64, 64, 64, 2) > costs.product(64, 64, 64, 1) > costs.product(32, 64, 64, 1) > 0
    assert costs.moved(10, 2**24) > costs.moved(10, 10)
    assert costs.permuted(2**24) > costs.permuted(2**10)
    assert costs_of(CPU, torch.float64).flop > costs.flop
    assert costs_of(torch.device("meta"), torch.float32) == costs
