"""Operators for the fused kernels, and their matrices from the drawn numbers in float64, not from ``to_dense``."""

from dataclasses import dataclass

import torch

from tnc.formats import CODES, IntFormat, TrellisFormat
from tnc.kernels import choose
from tnc.quant import rtn
from tnc.terms import LowRank, Product, Quantized, Sum, dense64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest, and a tile rounds t and each factor once
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-16}


@dataclass
class Case:
    operator: object
    matrix: torch.Tensor  # float64


def q_plus_lr(rows, columns, bits, *, group=None, symmetric=False, rank=0, scale=torch.float16,
              dtype=torch.float16, factors_first=False, seed=0):  # fmt: skip
    """``Quantized``, plus a `LowRank` unless ``rank`` is ``None``."""
    generator = torch.Generator().manual_seed(seed)
    format = IntFormat(bits, group_size=group, symmetric=symmetric)
    groups = columns // format.group_of(columns)
    codes = torch.randint(0, format.levels, (rows, columns), generator=generator)
    zero = torch.randint(0, format.levels, (rows, groups), generator=generator)
    step = ((torch.rand(rows, groups, generator=generator) + 0.1) / format.levels).to(scale)
    centre = torch.full_like(zero, format.levels // 2) if symmetric else zero
    wide = columns // groups
    matrix = step.double().repeat_interleave(wide, 1) * (codes - centre.repeat_interleave(wide, 1)).double()
    term = Quantized.from_codes(codes.to(DEVICE), step.to(DEVICE), zero.to(DEVICE), format)
    if rank is None:
        return Case(term, matrix.to(DEVICE))
    factors = low_rank(rows, columns, rank, dtype=dtype, seed=seed + 1)
    terms = (factors.operator, term) if factors_first else (term, factors.operator)
    return Case(Sum(terms), matrix.to(DEVICE) + factors.matrix)


def rounded(rows, columns, format, *, rank=None, factor_format=None, seed=0):
    """A drawn weight rounded to any format, plus drawn factors, rounded too if ``factor_format`` is given."""
    generator = torch.Generator().manual_seed(seed)
    term = rtn((torch.randn(rows, columns, generator=generator) / columns**0.5).to(DEVICE), format)
    if rank is None:
        return Case(term, dense64(term))
    if factor_format is None:
        factors = low_rank(rows, columns, rank, seed=seed + 1)
        return Case(Sum((term, factors.operator)), dense64(term) + factors.matrix)
    left, right = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((rows, rank), (rank, columns)))
    product = Product((rtn(left / 4, factor_format), rtn(right / columns**0.5, factor_format)))
    return Case(Sum((term, product)), dense64(term) + dense64(product))


def trellis(rows, columns, bits, *, rank=None, state_bits=12, dtype=torch.float16, factors_first=False, seed=0):
    """A trellis-coded term of anti-diagonals, plus a `LowRank` unless ``rank`` is ``None``."""
    generator = torch.Generator().manual_seed(seed)
    format = TrellisFormat(bits, state_bits, path="diagonal")
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    step = ((torch.rand(rows, 1, generator=generator) + 0.1) / columns**0.5).half()
    matrix = step.double() * CODES[format.code](format.states(codes)).double()
    term = Quantized.from_codes(codes.to(DEVICE), step.to(DEVICE), None, format)
    if rank is None:
        return Case(term, matrix.to(DEVICE))
    factors = low_rank(rows, columns, rank, dtype=dtype, seed=seed + 1)
    terms = (factors.operator, term) if factors_first else (term, factors.operator)
    return Case(Sum(terms), matrix.to(DEVICE) + factors.matrix)


def low_rank(rows, columns, rank, *, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator).to(dtype) / 4
    right = (torch.randn(rank, columns, generator=generator) / columns**0.5).to(dtype)
    return Case(LowRank(left.to(DEVICE), right.to(DEVICE)), (left.double() @ right.double()).to(DEVICE))


def inputs(tokens, columns, dtype, *, seed=9):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def answer(kernel, case, x):
    """What a kernel makes of ``x``, by the door that modules use."""
    bound = kernel.bind(case.operator)
    tensors = case.operator.tensors()
    return bound(x, bound.pack(tensors) if hasattr(bound, "pack") else tensors)


def check(kernel, case, x):
    """Shape, dtype and the relative error of every row of the answer."""
    y = answer(kernel, case, x)
    exact = x.double() @ case.matrix.T
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = (y.double() - exact).norm(dim=-1)
    assert (error <= 2 * ROUNDING[x.dtype] * exact.norm(dim=-1) + 1e-30).all(), float(
        (error / exact.norm(dim=-1)).max()
    )
    return y


def serving(case, name, device):
    """Why the row passes over the operator on a device."""
    return {c.name: c.reason for c in choose(case.operator, torch.device(device), torch.bfloat16)[1]}[name]
