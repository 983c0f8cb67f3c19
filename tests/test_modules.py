"""`FactoredLinear` stands in for ``torch.nn.Linear``: same map, same protocol, stored tensors untouched."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn.functional import linear

from tnc.errors import BackendError, ShapeError
from tnc.formats import IntFormat
from tnc.kernels import Kernel, register_kernel, table
from tnc.modules import FactoredLinear
from tnc.terms import (
    Dense,
    Diagonal,
    Hadamard,
    LowRank,
    Permutation,
    Product,
    Quantized,
    Sum,
    dense64,
    map_tensors,
)  # fmt: skip

BACKENDS = ["einsum", "reference"]  # the rows that serve every operator on every device
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def quantized(generator, m, n, bits=4):
    fmt = IntFormat(bits, group_size=n // 2)
    codes = torch.randint(0, fmt.levels, (m, n), generator=generator)
    zero = torch.randint(0, fmt.levels, (m, 2), generator=generator)
    return Quantized.from_codes(codes, (torch.rand(m, 2, generator=generator) / 8).half(), zero, fmt)


def q_plus_lr(m=6, n=8, rank=2, dtype=torch.float32, seed=0):
    """Q + L R, the main form; rows, columns and rank small enough to read."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return Sum((quantized(generator, m, n), LowRank(left.to(dtype), right.to(dtype))))


def nested(m=6, n=8, dtype=torch.float32):
    """(Q + L R) D: a sum inside a product."""
    vector = torch.rand(n, generator=torch.Generator().manual_seed(7)).to(dtype) + 0.5
    return Product((q_plus_lr(m, n, dtype=dtype), Diagonal(vector)))


def rotated(m=6, n=8, dtype=torch.float32):
    """Aᵀ (Q + L R) B P: rotations on both sides and a permutation."""
    order = Permutation.of(torch.arange(n).flip(0))
    ends = Hadamard.random(m).inverse(), Hadamard.random(n, seed=1)
    return Product((ends[0], q_plus_lr(m, n, dtype=dtype), ends[1], order))


def values(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def absolute(expression):
    """The same expression of absolute values, the scale of roundoff."""
    if isinstance(expression, Sum):
        return sum(absolute(term) for term in expression.terms)
    if isinstance(expression, Product):
        return torch.linalg.multi_dot([absolute(term) for term in expression.terms])
    if isinstance(expression, LowRank):
        return expression.left.double().abs() @ expression.right.double().abs()
    return dense64(expression).abs()


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Conv1D(nn.Module):
    """The layout of transformers' Conv1D."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(values(nx, nf)), nn.Parameter(values(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("make", [q_plus_lr, nested])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (40,)])
def test_forward_is_the_matrix_and_the_bias_in_the_dtype_of_x(backend, dtype, make, batch):
    operator, bias = make(), values(6)
    module = FactoredLinear(operator, bias, backend=backend)
    x = values(*batch, 8, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype and y.shape == (*batch, 6)
    exact = linear(x.double(), dense64(operator), bias.double())
    scale = linear(x.double().abs(), absolute(operator), bias.double().abs())
    # at most 4 factors and 4 intermediates rounded once each, products of 8 terms
    assert ((y.double() - exact).abs() <= 10 * torch.finfo(dtype).eps * scale).all()


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 7), half=st.integers(1, 5), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 999))
def test_operator_and_bits_come_back_as_given(m, half, bits, seed):
    operator = quantized(torch.Generator().manual_seed(seed), m, 2 * half, bits)
    module = FactoredLinear(operator)
    assert module.storage_bits == operator.storage_bits
    assert (module.out_features, module.in_features) == operator.shape
    assert module.operator.spec() == operator.spec()
    for name, tensor in operator.tensors().items():
        assert torch.equal(module.operator.tensors()[name], tensor)


def test_stored_names_and_kinds():
    module = FactoredLinear(nested(), values(6))
    assert {name: p.dtype for name, p in module.named_parameters()} == dict.fromkeys(
        ["0_1_left", "0_1_right", "1_vector", "bias"], torch.float32
    )
    dtypes = {"0_0_codes": torch.uint8, "0_0_scale": torch.float16, "0_0_zero": torch.uint8}
    assert {name: b.dtype for name, b in module.named_buffers()} == dtypes
    assert set(FactoredLinear(Dense(values(2, 3))).state_dict()) == {"matrix"}


def test_tensors_are_copied_and_the_operator_is_left_alone():
    operator, bias = q_plus_lr(), values(6)
    before = {name: tensor.clone() for name, tensor in operator.tensors().items()}
    module = FactoredLinear(operator, bias)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in operator.tensors().items())
    assert torch.equal(bias, values(6))
    strided = FactoredLinear(Dense(values(4, 3).T))
    assert strided.operator.matrix.is_contiguous()


def test_operator_follows_the_current_tensors():
    module = FactoredLinear(q_plus_lr())
    with torch.no_grad():
        module.get_parameter("1_left").mul_(2)
    assert torch.equal(module.operator.terms[1].left, 2 * q_plus_lr().terms[1].left)
    x = values(3, 8)
    torch.testing.assert_close(module(x), linear(x, module.operator.to_dense()))


# from_linear


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_takes_over_bias_mode_and_trainability(bias):
    dense = nn.Linear(8, 6, bias=bias).eval()
    dense.weight.requires_grad_(False)
    module = FactoredLinear.from_linear(dense, Dense(dense.weight.detach()))
    x = values(5, 8)
    torch.testing.assert_close(module(x), dense(x))
    assert not module.training and not module.get_parameter("matrix").requires_grad
    assert (module.bias is not None) is bias
    if bias:
        assert module.bias.requires_grad and module.bias.data_ptr() != dense.bias.data_ptr()
        module.bias.data.zero_()
        assert dense.bias.abs().sum() > 0


def test_from_linear_frozen_bias_stays_frozen():
    dense = nn.Linear(8, 6)
    dense.bias.requires_grad_(False)
    module = FactoredLinear.from_linear(dense, q_plus_lr())
    assert module.get_parameter("1_left").requires_grad and not module.bias.requires_grad and module.training


def test_from_linear_reads_conv1d_the_other_way_round():
    conv = Conv1D(6, 8)
    module = FactoredLinear.from_linear(conv, Dense(conv.weight.detach().T))
    x = values(2, 3, 8)
    torch.testing.assert_close(module(x), conv(x))


def test_from_linear_refuses_another_shape():
    message = r"operator of shape \(6, 8\) for Linear of shape \(8, 6\).*made from its weight"
    with pytest.raises(ShapeError, match=message):
        FactoredLinear.from_linear(nn.Linear(6, 8), q_plus_lr())
    with pytest.raises(ShapeError, match=r"\(8, 6\) for Conv1D of shape \(6, 8\)"):
        FactoredLinear.from_linear(Conv1D(6, 8), Dense(values(8, 6)))


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 2, 1), nn.LayerNorm(4), nn.ReLU()])
def test_from_linear_refuses_layers_without_a_matrix(layer):
    with pytest.raises(ShapeError, match=f"got {type(layer).__name__} without a weight matrix; expected"):
        FactoredLinear.from_linear(layer, q_plus_lr())


# errors


@pytest.mark.parametrize("bias", [values(5), values(6, 1), torch.ones(6, dtype=torch.int64)])
def test_bias_that_does_not_fit(bias):
    with pytest.raises(ShapeError, match=r"bias of shape .*expected a floating-point vector \(6,\)"):
        FactoredLinear(q_plus_lr(), bias)


@pytest.mark.parametrize(
    "x", [values(3, 7), values(3, 9), values(8, 3), torch.tensor(1.0), torch.ones(3, 8, dtype=torch.int64)]
)
def test_x_that_does_not_fit_names_both_sizes(x):
    shape = str(tuple(x.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ShapeError, match=rf"x of shape {shape} and {x.dtype}; expected .*in_features=8"):
        FactoredLinear(q_plus_lr())(x)


def test_unknown_backend_lists_the_valid_ones():
    with pytest.raises(
        BackendError, match=r"unknown backend 'cuda'; expected one of auto, .*composed, einsum, .*reference"
    ):
        FactoredLinear(q_plus_lr(), backend="cuda")


def test_tensors_on_two_devices():
    with pytest.raises(BackendError, match=r"several devices: .*'bias': 'meta'.*expected one"):
        FactoredLinear(q_plus_lr(), torch.ones(6, device="meta"))


# autograd


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 30])
@pytest.mark.parametrize("make", [q_plus_lr, nested])
def test_gradients_reach_x_the_factors_and_the_bias(backend, tokens, make):
    module = FactoredLinear(make(dtype=torch.float64), values(6, dtype=torch.float64), backend=backend)
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = values(tokens, 8, dtype=torch.float64).requires_grad_()

    def f(x, *given):
        return torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x,)).sum(0)

    assert torch.autograd.gradcheck(f, (x, *parameters), fast_mode=True)


def test_no_gradient_goes_through_codes_scales_and_zeros():
    module = FactoredLinear(q_plus_lr())
    module(values(3, 8)).sum().backward()
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in module.buffers())
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("make", [q_plus_lr, nested, rotated])
def test_autocast_narrows_x_and_no_product_of_factors(make):
    """As `nn.Linear` does: the output is narrow; inside, what the kernel does with narrow x outside of autocast."""
    module, x = FactoredLinear(make(), values(6)), values(5, 8)
    plain = nn.Linear(8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
        assert module(x.double()).dtype == plain.double()(x.double()).dtype == torch.float64
    assert torch.equal(y, module(x.bfloat16()))
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


# moving, copying, saving


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), nn.Module.float])
def test_stored_tensors_keep_their_dtype(move):
    module = FactoredLinear(q_plus_lr(dtype=torch.bfloat16), values(6))
    before, x = weights(module), values(3, 8, dtype=torch.float64)
    y = module(x)
    move(module)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert torch.equal(module(x), y)


def test_the_kernel_is_chosen_again_when_the_module_moves(monkeypatch):
    monkeypatch.setattr(table, "_KERNELS", dict(table._KERNELS))
    seen = []

    def serves(operator, device, dtype):
        if operator.kind == "sum":  # its terms are asked about too
            seen.append((device.type, dtype))
        return "never"

    register_kernel(Kernel("spy", serves, lambda operator: None, 99))
    module = FactoredLinear.from_linear(nn.Linear(8, 6, bias=False, dtype=torch.bfloat16), q_plus_lr())
    assert seen[-1] == ("cpu", torch.bfloat16)
    count = len(seen)
    module(values(2, 8))
    assert len(seen) == count, "never chosen in a call"
    module.half()
    assert seen[-1] == ("cpu", torch.float16)
    module.to("meta")
    assert seen[-1] == ("meta", torch.float16)
    real = FactoredLinear(q_plus_lr())
    count = len(seen)
    module.load_state_dict(real.state_dict(), assign=True)
    assert seen[count:] == [("cpu", torch.float16)], "tensors assigned from another device"


def test_gradients_move_with_their_parameters():
    module = FactoredLinear(q_plus_lr())
    module(values(3, 8)).sum().backward()
    module.half().to("cpu")
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_deepcopy_is_equal_and_independent():
    module = FactoredLinear(nested(), values(6))
    twin, x = copy.deepcopy(module), values(3, 8)
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        twin.get_parameter("1_vector").zero_()
    assert not torch.equal(twin(x), module(x))


def test_state_dict_round_trips_through_safetensors():
    module = FactoredLinear(nested(), values(6))
    other = FactoredLinear(map_tensors(nested(), torch.zeros_like), torch.zeros(6))
    other.load_state_dict(load(save(module.state_dict())), strict=True)
    assert torch.equal(other(values(3, 8)), module(values(3, 8)))


def test_built_on_meta_and_assigned():
    operator = map_tensors(nested(), lambda tensor: tensor.to("meta"))
    module = FactoredLinear.from_linear(nn.Linear(8, 6, device="meta"), operator)
    assert module.storage_bits == nested().storage_bits and "meta" in module.explain()
    assert module(torch.empty(3, 8, device="meta")).shape == (3, 6)
    real = FactoredLinear(nested(), values(6))
    module.load_state_dict(real.state_dict(), strict=True, assign=True)
    assert torch.equal(module(values(3, 8)), real(values(3, 8)))
    assert "cpu" in module.explain()


def test_to_empty_from_meta():
    module = FactoredLinear(map_tensors(nested(), lambda tensor: tensor.to("meta"))).to_empty(device="cpu")
    module.load_state_dict(FactoredLinear(nested()).state_dict())
    torch.testing.assert_close(module(values(3, 8)), FactoredLinear(nested())(values(3, 8)))


# compile and export


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [q_plus_lr, nested, rotated])
def test_compiles_into_one_graph(backend, make):
    torch._dynamo.reset()
    module = FactoredLinear(make(), values(6), backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (3, 50):
        x = values(tokens, 8).requires_grad_()
        module.zero_grad()
        module(x).square().sum().backward()
        expected = [x.grad, *(p.grad for p in module.parameters())]
        x.grad = None
        module.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, module(x))
        torch.testing.assert_close([x.grad, *(p.grad for p in module.parameters())], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("make", [q_plus_lr, rotated])
def test_exports(backend, strict, dynamic, make):
    module = FactoredLinear(make(), values(6), backend=backend)
    shapes = ({0: torch.export.Dim("tokens", min=1, max=4096)},) if dynamic else None
    program = torch.export.export(module, (values(7, 8),), dynamic_shapes=shapes, strict=strict).module()
    for tokens in (7, 2, 300) if dynamic else (7,):
        torch.testing.assert_close(program(values(tokens, 8)), module(values(tokens, 8)))


# text


def test_explain_names_the_expression_its_bits_and_every_kernel():
    module = FactoredLinear.from_linear(nn.Linear(8, 6), q_plus_lr())
    bits = q_plus_lr().storage_bits
    assert module.explain().splitlines()[:3] == [
        "FactoredLinear(8 -> 6): sum(quantized, low_rank)",
        f"  stored: {bits} bits, {bits / 48:.4g} bits per weight",
        "  kernels for backend='auto', cpu, float32:",
    ]
    for name in BACKENDS:
        assert f"    {name}: " in module.explain()
    assert "einsum: chosen: highest priority" in module.explain()
    assert "reference: passed over: einsum comes first" in module.explain()
    assert "x ([quantized] + [low_rank])" in module.explain(), "what the chosen kernel does"


def test_explain_of_a_named_backend():
    text = FactoredLinear(q_plus_lr(), backend="reference").explain()
    assert "reference: chosen: named by the caller" in text
    assert "rebuilds the dense weight on every call" in text


def test_repr():
    assert repr(FactoredLinear(nested(), values(6))) == (
        "FactoredLinear(in_features=8, out_features=6, bias=True, "
        "operator=product(sum(quantized, low_rank), diagonal), kernel=einsum)"
    )


# a network


def test_a_network_with_swapped_layers_trains_and_reloads():
    def build(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
        net[0] = FactoredLinear.from_linear(net[0], q_plus_lr(6, 8, seed=seed))
        net[2] = FactoredLinear.from_linear(net[2], q_plus_lr(8, 6, seed=seed))
        return net

    net, x, target = build(0), values(20, 8), values(20, 8, seed=5)
    codes = net[0].get_buffer("0_codes").clone()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(net[0].get_buffer("0_codes"), codes)
    other = build(1)
    other.load_state_dict(net.state_dict(), strict=True)
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert torch.equal(other(x), net(x))
