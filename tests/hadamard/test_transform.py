"""The fast transform against dense products with numpy and scipy, on every sort of size."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.errors import ShapeError
from tnc.hadamard import block_factors, hadamard_factors, hadamard_matrix, hadamard_transform, transform_flops
from tnc.hadamard.transform import _radices

# in_features and out_features of public models, and the blocks they get
REAL = {
    256: 256, 352: 352, 704: 704, 768: 768, 896: 896, 1408: 1408, 4096: 4096, 4864: 4864, 5504: 5504, 8960: 8960,
    11008: 11008, 13824: 13824, 14336: 14336, 14848: 14848, 18944: 18944, 27648: 27648, 28672: 28672,
    29568: 29568, 53248: 53248, 13696: 128, 13: 1, 26: 2, 156: 156, 624: 624, 97: 1, 1: 1, 2: 2, 12: 12,
}  # fmt: skip


@pytest.mark.parametrize(("size", "block"), REAL.items())
def test_blocks_of_real_sizes(size, block):
    factors = block_factors(size)
    assert np.prod(factors) == block
    assert hadamard_factors(size) == (factors if block == size else None)


def test_factors_are_the_cheapest():
    assert hadamard_factors(11008) == (64, 172) and hadamard_factors(14336) == (512, 28)
    assert hadamard_factors(13824) == (8, 12, 12, 12) and hadamard_factors(1) == (1,) and hadamard_factors(0) is None


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 64, 240, 352, 688, 1408, 2048])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_kronecker_product(size, transposed):
    matrix = np.ones((1, 1))
    for factor in hadamard_factors(size):
        matrix = np.kron(matrix, hadamard_matrix(factor).numpy())
    matrix = matrix.T if transposed else matrix
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    expected = x.numpy() @ matrix.T / size**0.5
    assert np.allclose(hadamard_transform(x, transposed=transposed).numpy(), expected, atol=1e-12)


@given(st.integers(0, 9), st.integers(0, 99))
def test_powers_of_two_are_scipys(p, seed):
    x = torch.randn(2, 2**p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = x.numpy() @ scipy.linalg.hadamard(2**p).T / 2 ** (p / 2)
    assert np.allclose(hadamard_transform(x).numpy(), expected, atol=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 300), st.sampled_from([(), (1,), (0,), (2, 3)]), st.integers(0, 99))
def test_is_orthogonal_on_every_size(size, batch, seed):
    x = torch.randn(*batch, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factors = block_factors(size)
    y = hadamard_transform(x, factors)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)
    assert torch.allclose(hadamard_transform(y, factors, transposed=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [11008, 14336])
def test_real_sizes_are_orthogonal(size):
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    y = hadamard_transform(x)
    assert float((hadamard_transform(y, transposed=True) - x).norm() / x.norm()) < 1e-6
    assert not torch.allclose(y, hadamard_transform(x, transposed=True))  # neither is symmetric


def test_blocks_are_transformed_alone():
    x = torch.zeros(8)
    x[5] = 1
    assert hadamard_transform(x, (4,)).tolist() == [0, 0, 0, 0, 0.5, -0.5, 0.5, -0.5]
    assert hadamard_transform(x, (1,)).tolist() == x.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_narrow_dtypes_are_rounded_once(dtype):
    x = torch.randn(5, 768, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = hadamard_transform(x)
    exact = hadamard_transform(x.double())
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all())


def test_sums_do_not_overflow_in_float16():
    assert hadamard_transform(torch.full((64,), 6e3).half())[0] == 4.8e4  # the plain sum is 3.8e5


def test_result_shares_no_memory_with_x():
    for size in (1, 3, 4):
        x = torch.ones(size)
        assert hadamard_transform(x, block_factors(size)).data_ptr() != x.data_ptr()


def test_gradients_of_both_orders():
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard_transform, (x,))
    assert torch.autograd.gradgradcheck(lambda t: hadamard_transform(t).pow(3), (x,))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    x = torch.randn(3, 24, requires_grad=True)
    compiled = torch.compile(lambda t: hadamard_transform(t * 2, (2, 12)), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), hadamard_transform(x * 2))
    torch.library.opcheck(torch.ops.tnc.hadamard_transform.default, (x, [2, 12], False))


def test_cost_is_n_log_n():
    assert transform_flops(4096, (4096,)) == 2 * 4096 * 48  # three radices of 16
    assert _radices((512, 28)) == (32, 16, 28) and _radices((2, 1)) == (2,) and _radices((1,)) == ()


@pytest.mark.parametrize(("size", "factors"), [(13, None), (6, (4,)), (188, None)])
def test_sizes_without_a_matrix_are_refused(size, factors):
    with pytest.raises(ShapeError, match=r"hadamard_transform got x of shape .* Take the factors from"):
        hadamard_transform(torch.zeros(2, size), factors)
