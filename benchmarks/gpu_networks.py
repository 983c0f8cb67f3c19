"""Times of matrix product operators and of weights coded on a trellis; see `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_rows import SHAPES, Row, again, bound_to, count, normal
from tnc.formats import IntFormat, TrellisFormat
from tnc.kernels import mpo as mpo_row
from tnc.kernels import mpo2 as mpo2_row
from tnc.kernels import mpo3 as mpo3_row
from tnc.kernels.trellis_launch import Coded
from tnc.kernels.trellis_ops import dense as dense_trellis
from tnc.kernels.trellis_ops import run as run_trellis
from tnc.kernels.trellis_ops import stream_of
from tnc.quant import rtn
from tnc.terms import Chain, Mpo, dense64


def mpo_rows() -> list[Row]:
    """Two cores, fused and by torch's einsum."""
    rows = []
    for o1, i1, o2, i2 in ((64, 64, 64, 64), (112, 64, 128, 64)):
        size = 2 * 64 * (o1 * i1 + o2 * i2)
        sets = []
        for _ in range(count(size, 1)):
            first = normal(64, i1, o1, 1, scale=0.1).permute(3, 2, 1, 0)  # bond-major in memory, as modules hold it
            sets.append((first, normal(64, o2, i2, 1, scale=0.1)))
        weight = torch.einsum("yaid,dbjz->abij", *(t.double() for t in sets[0])).reshape(o1 * o2, i1 * i2)
        for tokens in (1, 16, 64, 512):
            x = normal(tokens, i1 * i2)
            exact, some = x.double() @ weight.T, sets if tokens <= 16 else sets[:16]
            fused = lambda s, x=x: mpo2_row.mpo2(x, *s)  # noqa: E731
            plain = lambda s, x=x, i1=i1: torch.einsum(  # noqa: E731
                "tij,yaid,dbjz->tab", x.unflatten(1, (i1, -1)), *s
            ).flatten(1)
            rows.append(Row("mpo, bond 64", f"{i1 * i2}->{o1 * o2}", tokens, some, fused, exact))
            rows.append(Row("mpo, bond 64, einsum", f"{i1 * i2}->{o1 * o2}", tokens, some, plain, exact))
    return rows


def mpo3_rows() -> list[Row]:
    """Three cores, fused, as the planned ways do, and by torch's einsum."""
    rows = []
    shapes = ((1, 16, 16, 32), (32, 16, 16, 32), (32, 16, 16, 1))
    sets: list[tuple[Tensor, ...]] = [tuple(normal(*s, scale=(s[0] * 16) ** -0.5) for s in shapes) for _ in range(64)]
    operator = Mpo(sets[0])
    weight, planned, names = operator.to_dense().double(), mpo_row.bind(operator), tuple(operator.tensors())
    for tokens in (1, 4, 16, 64, 256):
        x = normal(tokens, 4096)
        exact, some = x.double() @ weight.T, sets if tokens <= 16 else sets[:16]
        fused = lambda s, x=x: mpo3_row.mpo3(x, *s)  # noqa: E731
        apart = lambda s, x=x: planned(x, dict(zip(names, s, strict=True)))  # noqa: E731
        plain = lambda s, x=x: torch.einsum(  # noqa: E731
            "tijk,aoib,bpjc,cqkd->topq", x.unflatten(1, (16, 16, 16)), *s
        ).flatten(1)
        for name, launch in (("", fused), (", planned", apart), (", einsum", plain)):
            rows.append(Row(f"mpo, 3 cores of bond 32{name}", "4096->4096", tokens, some, launch, exact))
    return rows


def chain_rows() -> Iterator[Row]:
    """Operators of int8 cores, by the row that the table chooses and by einsum, which rebuilds the cores."""
    bonds = {
        "2 cores of bond 64": ((64, 64), (64, 64), (1, 64, 1)),
        "3 cores of bond 32": ((16,) * 3, (16,) * 3, (1, 32, 32, 1)),
    }
    for name, (outs, ins, ranks) in bonds.items():
        chains = []
        for _ in range(64):
            sizes = [(ranks[k] * outs[k], ins[k] * ranks[k + 1]) for k in range(len(outs))]
            terms = [rtn(normal(a, b, scale=ins[k] ** -0.5 * ranks[k + 1] ** -0.5), IntFormat(8, 16, pad=True))
                     for k, (a, b) in enumerate(sizes)]  # fmt: skip
            chains.append(Chain(tuple(terms), ranks, outs, ins))
        weight = dense64(chains[0])
        for backend in ("auto", "einsum"):
            sets = [bound_to(each, backend) for each in chains]
            for tokens in (1, 16):
                x = normal(tokens, weight.shape[1])
                shown = f"int8 {name}" + ("" if backend == "auto" else f", {backend}")
                yield Row(shown, "4096->4096", tokens, sets, lambda s, x=x: s(x), x.double() @ weight.T)


def coded(rows: int, columns: int, bits: int, rank: int) -> Coded:
    """Random codes of a trellis, scales and factors."""
    format = TrellisFormat(bits, path="diagonal")
    codes = torch.randint(0, 1 << bits, (rows, columns), device="cuda").to(torch.uint8)
    held = stream_of(rows, columns, format).pack(codes)
    steps = (torch.rand(rows, device="cuda") + 0.1) / 148 / columns**0.5
    left, right = normal(rows, rank, scale=0.05), normal(rank, columns, scale=0.05)
    words = (held[name] for name in ("stream", "firsts", "items", "fixes"))
    return Coded(*words, steps, left, right, bits, format.state_bits, format.length)


def trellis_rows() -> list[Row]:
    """Weights coded on a trellis, alone and with factors."""
    rows = []
    for n, k in (*SHAPES, (4096, 14336)):
        for bits, rank, many in ((2, 0, (1, 2, 16, 32, 64)), (2, 64, (1, 16)), (3, 0, (1, 16)), (4, 0, (1, 16))):
            first = coded(n, k, bits, rank)
            sets = [
                first,
                *(
                    again(first, "stream", "items", "fixes", "left", "right")
                    for _ in range(count(n * k * bits / 8, 1) - 1)
                ),
            ]
            weight = dense_trellis(first, torch.float64) + first.left.double() @ first.right.double()
            for tokens in many:
                x = normal(tokens, k)
                name = f"trellis {bits} bits" + (f" + rank {rank}" if rank else "")
                launch = lambda s, x=x: run_trellis(x, s)  # noqa: E731
                rows.append(Row(name, f"{k}->{n}", tokens, sets, launch, x.double() @ weight.T))
    return rows
