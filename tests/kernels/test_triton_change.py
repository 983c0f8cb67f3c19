"""Q + L R of a gathered, scaled or rotated x in one launch: against float64, with outputs that begin as NaN."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE, ROUNDING, inputs, q_plus_lr, rounded

from tnc.formats import number_format
from tnc.kernels import change as module
from tnc.kernels import qlr, qlr_launch, qlr_ops
from tnc.kernels import qlr_change_ops as ops
from tnc.kernels.change import Change, changes
from tnc.kernels.composed import Composed
from tnc.kernels.parts import Part, transform
from tnc.kernels.qlr_change_ops import launched, qlr_changed, run_changed
from tnc.kernels.qlr_launch import tile, vector
from tnc.kernels.together import together
from tnc.terms import Diagonal, Hadamard, LowRank, Permutation, Product, Selection, Sum, map_tensors

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


def here(term):
    return map_tensors(term, lambda tensor: tensor.to(DEVICE))


def rotation(size, inverse=False):
    found = Hadamard.random(size, seed=3)
    return here(found.inverse() if inverse else found)


def order(size, seed=0):
    return here(Permutation.of(torch.randperm(size, generator=torch.Generator().manual_seed(seed))))


def scaling(size, dtype=SINGLE):
    return here(Diagonal((torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)))


def packed_of(case):
    bound = qlr.bind(case.operator)
    return bound.packed(bound.pack(case.operator.tensors()))


def change_of(*terms, apart=False):
    return module.change_of([(term.spec(), term.tensors()) for term in terms], apart=apart)


def exact_of(terms, case, x, apart=False):
    """In float64, from the dense matrices of the transforms."""
    seen = x.double()
    for term in terms:
        seen = seen @ term.to_dense().double().T
    if not apart:
        return seen @ case.matrix.T
    factors = case.operator.terms[1]
    low_rank = factors.left.double() @ factors.right.double()
    return seen @ (case.matrix - low_rank).T + x.double() @ low_rank.T


def agrees(y, exact, dtype):
    assert y.dtype == dtype and y.shape == exact.shape
    error = (y.double() - exact).norm(dim=-1)
    assert (error <= 4 * ROUNDING[dtype] * exact.norm(dim=-1)).all(), float((error / exact.norm(dim=-1)).max())


def one(x, change, packed):
    """In the launch wherever it can be, whether that is the fastest way or not."""
    found = launched(x, change, (packed,))
    return run_changed(x, change, packed) if found is None else found[0]


FORMS = {
    "rotated": lambda n: (rotation(n),),
    "inverse": lambda n: (rotation(n, inverse=True),),
    "scaled": lambda n: (scaling(n),),
    "ordered": lambda n: (order(n),),
    "all": lambda n: (order(n), scaling(n, HALF), rotation(n)),
    "all inverse": lambda n: (order(n), scaling(n, BRAIN), rotation(n, inverse=True)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tokens", "columns", "rank"), [(1, 320, 9), (2, 320, 9), (3, 320, 9), (17, 320, 9), (1, 344, None), (3, 344, None)]
)
def test_forms(form, tokens, columns, rank):
    """Blocks of 320 = 16 · 20 and 344 = 2 · 172."""
    case = q_plus_lr(37, columns, 4, group=64 if columns == 320 else None, rank=rank)
    terms, x = FORMS[form](columns), inputs(tokens, columns, HALF)
    y = one(x, change_of(*terms), packed_of(case))
    agrees(y, exact_of(terms, case, x), HALF)
    assert torch.equal(y, one(x, change_of(*terms), packed_of(case)))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("columns", "factors"), [(320, (8, 8)), (240, (12, 20)), (48, (2, 12)), (12, (12,)), (2, (2,))]
)
def test_several_blocks_and_sides_that_are_not_symmetric(columns, factors, inverse):
    case = q_plus_lr(9, columns, 4, rank=3)
    term = Hadamard(rotation(columns).signs, columns, factors, inverse)
    for tokens in (1, 3):
        x = inputs(tokens, columns, HALF)
        agrees(one(x, change_of(term), packed_of(case)), exact_of((term,), case, x), HALF)


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_dtypes_and_many_tokens(dtype, tokens):
    case = q_plus_lr(19, 128, 4, group=32, rank=5, dtype=BRAIN)
    x = inputs(tokens, 128, dtype)
    for form in ("rotated", "all", "ordered"):
        terms = FORMS[form](128)
        y, exact = one(x, change_of(*terms), packed_of(case)), exact_of(terms, case, x)
        if dtype == torch.float64:
            assert (y - exact).norm() <= 1e-12 * exact.norm()
        else:
            agrees(y, exact, dtype)


@pytest.mark.parametrize("form", ["ordered", "rotated", "all"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_r_may_see_x_as_it_is(form, tokens):
    """An activation order: ``Q P + L R`` is one operator of this row, whichever term is first."""
    case, terms = q_plus_lr(19, 128, 4, group=32, rank=5), FORMS[form](128)
    x = inputs(tokens, 128, HALF)
    exact = exact_of(terms, case, x, apart=True)
    agrees(one(x, change_of(*terms, apart=True), packed_of(case)), exact, HALF)
    base, factors = case.operator.terms
    product = Product((base, *reversed(terms)))
    for operator in (Sum((product, factors)), Sum((factors, product))):
        assert qlr.refusal(operator) is None
        bound = qlr.bind(operator)
        held = bound.pack(operator.tensors())
        agrees(bound(x.reshape(1, tokens, 128), held)[0], exact, HALF)
        again = bound.unpack(held)
        assert again.keys() == operator.tensors().keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in operator.tensors().items())


def test_a_selection_of_more_features():
    """x has more entries than the operator has columns; R sees the selected ones."""
    case = q_plus_lr(19, 128, 4, group=32, rank=5)
    chosen = here(Selection.of(torch.arange(0, 384, 3), 384))
    for tokens in (1, 2, 5):
        x = inputs(tokens, 384, HALF)
        for terms in ((chosen,), (chosen, scaling(128), rotation(128))):
            agrees(one(x, change_of(*terms), packed_of(case)), exact_of(terms, case, x), HALF)


@pytest.mark.parametrize(("bits", "format"), [(2, None), (3, None), (8, None), (4, "nf4"), (4, "mxfp4")])
def test_formats(bits, format):
    if format is None:
        case = q_plus_lr(21, 256, bits, group=64, rank=9)
    else:
        case = rounded(21, 256, number_format(format), rank=9)
    for tokens in (1, 4):
        x = inputs(tokens, 256, HALF)
        agrees(one(x, change_of(rotation(256)), packed_of(case)), exact_of((rotation(256),), case, x), HALF)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("form", ["rotated", "ordered"])
def test_siblings_share_what_is_made(form, tokens):
    cases = [q_plus_lr(rows, 320, 4, group=64, rank=rank, seed=rows) for rows, rank in ((37, 9), (64, 16), (5, 3))]
    terms, x = FORMS[form](320), inputs(tokens, 320, HALF)
    found = launched(x, change_of(*terms), [packed_of(case) for case in cases])
    for y, case in zip(found, cases, strict=True):
        agrees(y, exact_of(terms, case, x), HALF)


@pytest.mark.parametrize("launch", [vector, tile])
@pytest.mark.parametrize("form", [None, "rotated", "scaled"])
def test_counters_return_to_zero(launch, form, counters_taken):
    taken = counters_taken(qlr_launch)
    change = None if form is None else change_of(*FORMS[form](320))
    packed = packed_of(q_plus_lr(37, 320, 4, group=64, rank=9))
    for _ in range(2):
        launch(inputs(2, 320, HALF), packed, change=change)
    assert len(taken) == 2 and not any(each.any() for each in taken)


def chain(case, terms):
    """The operator as `composed` binds it where ``qlr`` serves."""
    count = len(terms)
    parts = [transform(term, f"{count - i}.") for i, term in enumerate(terms)]
    middle = Part("qlr", qlr.bind(case.operator), (("", "0."),))
    return Composed((*parts, middle), False, torch.device(DEVICE), middle.kernel.takes([term.spec() for term in terms]))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("h",), 1), (("d",), 1), (("p", "d", "h"), 3), (("d", "h"), 2), (("p", "h"), 2), (("h", "d"), 1),
        (("h", "p"), 1), (("d", "p", "h"), 2), (("h", "h"), 1), (("h", "d", "h"), 2),
    ],
)  # fmt: skip
def test_a_chain_takes_what_one_change_can_be(names, taken):
    made = {"h": rotation(128), "d": scaling(128), "p": order(128)}
    terms = [made[name] for name in names]
    case = q_plus_lr(19, 128, 4, group=32, rank=5)
    bound = chain(case, terms)
    assert bound.taken == taken == changes([term.spec() for term in terms])
    operator = Product((case.operator, *reversed(terms)))
    held = bound.pack(operator.tensors())
    assert all(torch.equal(bound.unpack(held)[name], tensor) for name, tensor in operator.tensors().items())
    for tokens in (1, 4):
        x = inputs(tokens, 128, HALF)
        agrees(bound(x, held), exact_of(terms, case, x), HALF)


def test_chains_of_one_input_go_in_one_launch(monkeypatch):
    """Siblings behind equal transforms: what is common is made in their launch."""
    cases, terms = (
        [q_plus_lr(rows, 128, 4, group=32, rank=5, seed=rows) for rows in (19, 8)],
        (scaling(128), rotation(128)),
    )
    bound = [chain(case, terms) for case in cases]
    operators = [Product((case.operator, *reversed(terms))) for case in cases]
    held = [each.pack(operator.tensors()) for each, operator in zip(bound, operators, strict=True)]
    plan = together(bound, held, lambda i: operators[i], torch.device(DEVICE), HALF)
    assert plan.joint and plan.common == 2
    launches = []
    for name in ("vector", "tile"):
        real = getattr(qlr_launch, name)
        counted = lambda x, *packs, change=None, real=real: launches.append(change) or real(x, *packs, change=change)  # noqa: E731
        monkeypatch.setattr(f"tnc.kernels.qlr_ops.{name}", counted)
    for tokens in (1, 5, 40):
        launches.clear()
        x = inputs(tokens, 128, HALF)
        started = plan.start(x, held)
        for i, case in enumerate(cases):
            agrees(plan.finish(started, x, i, held[i]), exact_of(terms, case, x), HALF)
        assert len(launches) == (1 if tokens <= qlr_ops.TILE_TOKENS else 2)
        assert all((each is not None) == (tokens <= qlr_ops.TILE_TOKENS) for each in launches)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("form", ["rotated", "inverse", "all", "scaled"])
def test_gradients_are_those_of_the_parts(form, apart):
    case = q_plus_lr(19, 64, 4, group=32, rank=3, dtype=SINGLE)
    terms, packed = FORMS[form](64), packed_of(case)
    left, right = (getattr(packed, name).requires_grad_() for name in ("left", "right"))
    x = inputs(3, 64, SINGLE).requires_grad_()
    change = change_of(*terms, apart=apart)
    if change.factor is not None:
        change = replace(change, factor=change.factor.float().requires_grad_())
    wanted = [tensor for tensor in (x, left, right, change.factor) if tensor is not None]
    arguments = (x, change.order, change.factor, change.signs, packed.low, packed.high, packed.groups, left, right,
                 None, change.factors, change.inverse, apart, 4, 32, "half", "")  # fmt: skip
    seed = inputs(3, 19, SINGLE, seed=3)
    got = torch.autograd.grad(qlr_changed(*arguments), wanted, seed)
    base = (case.matrix - (left @ right).detach().double()).detach()
    seen = x.double()
    for term in terms:
        matrix = term.to_dense().double()
        seen = seen * change.factor.double() if isinstance(term, Diagonal) else seen @ matrix.T
    y = seen @ base.T + (x.double() if apart else seen) @ right.double().T @ left.double().T
    for mine, theirs in zip(got, torch.autograd.grad(y, wanted, seed.double()), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=2e-4, atol=1e-5)
    if form == "rotated":
        torch.library.opcheck(
            qlr_changed, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


def test_compiles_without_graph_breaks():
    case, terms = q_plus_lr(9, 64, 4, group=32, rank=2), (scaling(64), rotation(64))
    bound = chain(case, terms)
    held = bound.pack(Product((case.operator, *reversed(terms))).tensors())
    compiled = torch.compile(lambda x: bound(x, held) + 1, fullgraph=True, backend="aot_eager")
    for tokens in (1, 3):
        x = inputs(tokens, 64, HALF)
        assert torch.equal(compiled(x), bound(x, held) + 1)


def test_what_is_not_taken():
    for size, taken in ((2**14, 1), (14336, 1), (11008, 1), (53248, 0), (2**20, 0)):
        assert changes([Hadamard.random(size).spec()]) == taken, size
    assert changes([]) == 0
    made = qlr.bind(q_plus_lr(4, 64, 4, group=32, rank=None).operator)
    for size, tokens in ((4096, ops.ROTATED_TOKENS), (11008, 0), (14336, 0)):  # 64 · 64, 64 · 172, 128 · 112
        turn, scale = Hadamard.random(size).spec(), Diagonal(torch.ones(size)).spec()
        assert made.most([turn]) == tokens and made.takes([turn]) == bool(tokens)
        assert made.most([scale, turn]) == qlr_ops.TILE_TOKENS and made.takes([scale, turn]) == 2
    assert Change().fits(SINGLE) and not Change().fits(torch.float64)
    assert not Change(signs=torch.zeros(1), factors=(256, 208)).fits(HALF)
    base = q_plus_lr(4, 64, 4, group=32, rank=None).operator
    factors = LowRank(torch.ones(4, 1), torch.ones(1, 64))
    chosen, wide = Selection.of(torch.arange(64), 96), LowRank(torch.ones(4, 1), torch.ones(1, 96))
    for operator in (Sum((Product((base, chosen)), wide)), Sum((Product((base,)), factors)), Product((base, chosen))):
        assert qlr.refusal(operator) == "it runs a quantized term, alone or plus one low-rank term"


def test_it_says_what_is_in_the_launch_and_what_that_adds(monkeypatch):
    case, gpu = q_plus_lr(19, 128, 4, group=32, rank=5), torch.device("cuda")
    alone = chain(case, ()).describe()
    assert alone.startswith("qlr (up to 32 tokens")
    said = chain(case, (rotation(128), scaling(128))).describe()
    assert said.startswith(f"fast hadamard, then to {qlr_ops.TILE_TOKENS} tokens in one launch diagonal and qlr (")
    said = chain(case, (scaling(128), rotation(128))).describe()
    assert said.startswith(f"to {qlr_ops.TILE_TOKENS} tokens in one launch diagonal and fast hadamard and qlr (")
    said = chain(case, (rotation(128),)).describe()
    assert said.startswith(f"to {ops.ROTATED_TOKENS} tokens in one launch fast hadamard and qlr (")
    whole, middle = chain(case, (scaling(128), rotation(128))), qlr.bind(case.operator)
    monkeypatch.setattr(type(middle), "microseconds", lambda self, tokens, device: 7.0 if tokens < 100 else None)
    specs = [scaling(128).spec(), rotation(128).spec()]
    assert middle.most(specs[1:]) == ops.ROTATED_TOKENS and middle.most(specs[:1]) == qlr_ops.TILE_TOKENS
    assert middle.changing(specs, 33, gpu) is None and middle.changing(specs, 1, torch.device("cpu")) is None
    for tokens in (1, 2):
        assert whole.microseconds(tokens, gpu) == 7.0 + module.added(specs, tokens)
    parts = whole.parts[0].microseconds(40, gpu) + whole.parts[1].microseconds(40, gpu)
    assert whole.microseconds(40, gpu) == parts + 7.0
    turned = [module.added([rotation(size).spec()], 1) for size in (4096, 14336)]
    assert 0 < module.added([scaling(8).spec()], 1) < module.added([order(8).spec()], 1) < turned[0] < turned[1]
