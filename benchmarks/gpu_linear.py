"""Times of dense, quantized and low-rank layers; see `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_rows import BRAIN, SHAPES, Row, again, count, normal
from tnc.formats import IntFormat, number_format
from tnc.kernels import low_rank as low_rank_row
from tnc.kernels import qlr as qlr_row
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import dense, run
from tnc.kernels.words import group_words, unit_of
from tnc.quant import rtn
from tnc.terms import LowRank, Sum, dense64


def packed(rows: int, columns: int, bits: int, rank: int) -> Packed:
    """Random codes, scales and factors, group 128."""
    units = columns // unit_of(bits)
    low = torch.randint(-(2**31), 2**31 - 1, (units, rows, 16), dtype=torch.int32, device="cuda")
    high = torch.randint(-(2**31), 2**31 - 1, (units, rows, 8), dtype=torch.int32, device="cuda") if bits == 3 else low
    scale = (torch.rand(rows, columns // 128, device="cuda") / 2**bits / 40 + 1e-4).to(BRAIN)
    zero = torch.randint(0, 2**bits, scale.shape, device="cuda")
    left, right = normal(rows, rank, scale=0.05), normal(rank, columns, scale=0.05)
    return Packed(low, high, group_words(scale, zero), left, right, bits, 128, "brain")


def dense_rows() -> list[Row]:
    """The dense layer."""
    rows = []
    for n, k in SHAPES:
        sets = [(normal(n, k, scale=0.02),) for _ in range(count(2 * n * k, 1))]
        for tokens in (1, 16, 64, 512, 4096):
            x = normal(tokens, k)
            exact = x.double() @ sets[0][0].double().T
            rows.append(Row("dense bf16", f"{k}->{n}", tokens, sets, lambda s, x=x: linear(x, s[0]), exact))
    return rows


def qlr_rows() -> list[Row]:
    """Q + L R, and Q alone."""
    rows = []
    for n, k in SHAPES:
        for bits, rank, many in [(4, 64, (1, 2, 16, 32, 64, 512, 4096)), (4, 0, (1, 16)), (4, 128, (1, 16)),
                                 (2, 64, (1, 16)), (3, 64, (1, 16)), (8, 64, (1, 16))]:  # fmt: skip
            sets = [packed(n, k, bits, rank) for _ in range(count(n * k * (bits + 0.25) / 8, 1))]
            weight = dense(sets[0], torch.float64)
            for tokens in many:
                x = normal(tokens, k)
                name = f"int{bits} g128 + rank {rank}"
                rows.append(Row(name, f"{k}->{n}", tokens, sets, lambda s, x=x: run(x, s), x.double() @ weight.T))
    return rows


def table_rows() -> Iterator[Row]:
    """Tables of levels and other formats, with factors of rank 64; names say the columns of a scale."""
    formats = {"nf4 g64": number_format("nf4", group_size=64), "fp4 g64": number_format("fp4", group_size=64),
               "nf3 g64": number_format("nf3", group_size=64), "mxfp4 g32": number_format("mxfp4"),
               "nvfp4 g16": number_format("nvfp4"), "int5 g128": IntFormat(5, group_size=128)}  # fmt: skip
    for n, k in SHAPES:
        for name, format in formats.items():
            term = Sum(
                (
                    rtn(normal(n, k, scale=k**-0.5), format),
                    LowRank(normal(n, 64, scale=0.05), normal(64, k, scale=0.05)),
                )
            )
            bound = qlr_row.bind(term)
            first, weight = bound.packed(bound.pack(term.tensors())), dense64(term)
            sets = [first, *(again(first, "low", "high", "groups") for _ in range(count(n * k * 4.5 / 8, 1) - 1))]
            for tokens in (1, 16):
                x = normal(tokens, k)
                launch = lambda s, x=x: run(x, s)  # noqa: E731
                yield Row(f"{name} + rank 64", f"{k}->{n}", tokens, sets, launch, x.double() @ weight.T)
            del sets, weight


def _tinygemm(n: int, k: int) -> tuple[Tensor, ...]:
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int32)
    words = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    scale = torch.rand(k // 128, n, 1, device="cuda") / 600 + 1e-4
    both = torch.cat([scale, torch.zeros_like(scale)], 2).to(BRAIN)
    return words, both, normal(n, 64, scale=0.05), normal(64, k, scale=0.05), codes


def unfused_rows() -> list[Row]:
    """Tinygemm's int4 kernel and the two products of the low-rank term, the best composition at one token."""
    rows = []
    for n, k in SHAPES:
        sets = [_tinygemm(n, k) for _ in range(count(n * k * 4.25 / 8, 1))]
        _, both, left, right, codes = sets[0]
        scale = both[..., 0].double().T.repeat_interleave(128, 1)
        weight = (codes.double() - 8) * scale + left.double() @ right.double()
        sets = [each[:4] for each in sets]
        for tokens in (1, 16):
            x = normal(tokens, k)

            def launch(s: tuple[Tensor, ...], x: Tensor = x) -> Tensor:
                y = torch.ops.aten._weight_int4pack_mm(x, s[0], 128, s[1])
                return torch.addmm(y, linear(x, s[3]), s[2].T)

            rows.append(
                Row("unfused: tinygemm int4 + rank 64", f"{k}->{n}", tokens, sets, launch, x.double() @ weight.T)
            )
    return rows


def low_rank_rows() -> list[Row]:
    """L (R x), fused and as two products."""
    rows = []
    for (n, k), rank in zip(SHAPES, (512, 800), strict=True):
        sets = [(normal(n, rank), normal(rank, k, scale=0.02)) for _ in range(count(2 * rank * (n + k), 1))]
        for tokens in (1, 16, 64):
            x = normal(tokens, k)
            exact = x.double() @ sets[0][1].double().T @ sets[0][0].double().T
            fused = lambda s, x=x: low_rank_row.low_rank(x, *s)  # noqa: E731
            apart = lambda s, x=x: linear(linear(x, s[1]), s[0])  # noqa: E731
            rows += [Row(f"low rank {rank}", f"{k}->{n}", tokens, sets, fused, exact),
                     Row(f"low rank {rank}, two products", f"{k}->{n}", tokens, sets, apart, exact)]  # fmt: skip
    return rows
