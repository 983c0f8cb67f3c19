"""Times of the fused kernels on this GPU, cold weights, CUDA graphs; every answer is checked before its clock starts.

A row is captured ``R`` times over ``R`` weight sets of together 300 MB, so weights come from memory and x from L2; the
time is the median of 15 replays, L2 flushed before each, over R. Gaps between launches are included.

python -m benchmarks.gpu [--out results/gpu.json] [--only dense qlr]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_clock import cold_microseconds, gpu, nan_filled
from benchmarks.gpu_decoder import decoders
from benchmarks.results import write
from tnc.formats import IntFormat, TrellisFormat, number_format
from tnc.kernels import Repacking, choose
from tnc.kernels import low_rank as low_rank_row
from tnc.kernels import mpo as mpo_row
from tnc.kernels import mpo2 as mpo2_row
from tnc.kernels import mpo3 as mpo3_row
from tnc.kernels import qlr as qlr_row
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.qlr_ops import dense, run
from tnc.kernels.trellis_launch import Coded
from tnc.kernels.trellis_ops import dense as dense_trellis
from tnc.kernels.trellis_ops import run as run_trellis
from tnc.kernels.trellis_ops import stream_of
from tnc.kernels.words import group_words, unit_of
from tnc.quant import rtn
from tnc.terms import Chain, Expression, LowRank, Mpo, Sum, dense64

BRAIN = torch.bfloat16
TOTAL = 300e6  # bytes of all weight sets
SHAPES = ((4096, 4096), (14336, 4096))


@dataclass
class Row:
    """One timed way of one shape: ``launch(set)`` runs it, ``exact`` is the float64 answer of set 0."""

    kernel: str
    shape: str
    tokens: int
    sets: Sequence[Any]
    launch: Callable[..., Tensor | list[Tensor]]
    exact: Tensor


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """bfloat16 normal numbers."""
    return (torch.randn(*shape, device="cuda") * scale).to(BRAIN)


def packed(rows: int, columns: int, bits: int, rank: int) -> Packed:
    """Random codes, scales and factors, group 128."""
    units = columns // unit_of(bits)
    low = torch.randint(-(2**31), 2**31 - 1, (units, rows, 16), dtype=torch.int32, device="cuda")
    high = torch.randint(-(2**31), 2**31 - 1, (units, rows, 8), dtype=torch.int32, device="cuda") if bits == 3 else low
    scale = (torch.rand(rows, columns // 128, device="cuda") / 2**bits / 40 + 1e-4).to(BRAIN)
    zero = torch.randint(0, 2**bits, scale.shape, device="cuda")
    left, right = normal(rows, rank, scale=0.05), normal(rank, columns, scale=0.05)
    return Packed(low, high, group_words(scale, zero), left, right, bits, 128, "brain")


def again(each: Any, *names: str) -> Any:  # noqa: ANN401
    """The same numbers with these tensors elsewhere in memory."""
    return replace(each, **{name: getattr(each, name).clone() for name in names})


def count(size: float, tokens: int) -> int:
    """Weight sets that make `TOTAL` bytes."""
    return max(3, min(64 if tokens <= 16 else 16, int(TOTAL / size)))


def error(row: Row) -> float:
    """Relative error of set 0, with NaN in memory that nothing wrote; several outputs lie one after another."""
    with nan_filled():
        y = row.launch(row.sets[0])
    flat = torch.cat([part.flatten() for part in (y if isinstance(y, list) else [y])]).double()
    exact = row.exact.flatten()
    return float((flat - exact).norm() / exact.norm())


def reported(rows: Iterable[Row], width: int = 34) -> Iterator[dict[str, Any]]:
    """Each row checked, timed if it is right, and printed, its name ``width`` wide."""
    for row in rows:
        wrong = error(row)
        time = cold_microseconds([partial(row.launch, each) for each in row.sets]) if wrong < 1e-2 else None
        shown = "no time: wrong" if time is None else f"{time:9.2f} us"
        print(f"{row.kernel:<{width}}{row.shape:<14}{row.tokens:>5} {shown}  error {wrong:.1e}", flush=True)
        yield {"kernel": row.kernel, "shape": row.shape, "tokens": row.tokens, "error": wrong, "us": time}


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


def bound_to(operator: Expression, backend: str) -> Callable[[Tensor], Tensor]:
    """An operator by a kernel of the table, with the tensors as that holds them."""
    kernel, _ = choose(operator, torch.device("cuda", 0), BRAIN, backend=backend)
    tensors = kernel.pack(operator.tensors()) if isinstance(kernel, Repacking) else operator.tensors()
    return lambda x: kernel(x, tensors)


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


def decoder_rows() -> Iterator[dict[str, Any]]:
    """Whole decoders, printed."""
    for row in decoders():
        shown = (
            "no time: wrong" if row["ms"] is None else f"{row['ms']:7.3f} ms {row['tokens_per_second']:7.1f} tokens/s"
        )
        print(f"{row['decoder']:<40}{row['glue']:<34}{shown}  error {row['error']}", flush=True)
        yield row


def timed(make: Callable[[], Iterable[Row]]) -> Iterator[dict[str, Any]]:
    """The rows of a group, and their memory freed."""
    yield from reported(make())
    torch.cuda.empty_cache()


_TIMED: dict[str, Callable[[], Iterable[Row]]] = {
    "dense": dense_rows, "qlr": qlr_rows, "tables": table_rows, "unfused": unfused_rows, "low_rank": low_rank_rows,
    "mpo": mpo_rows, "mpo3": mpo3_rows, "chain": chain_rows, "trellis": trellis_rows,
}  # fmt: skip
GROUPS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "decoder": decoder_rows, **{name: partial(timed, make) for name, make in _TIMED.items()}
}  # fmt: skip


def main() -> None:
    """Run, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"))
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    arguments = parser.parse_args()
    machine = gpu()
    print(json.dumps(machine))
    torch.manual_seed(0)
    keep(arguments.out, machine, chain.from_iterable(rows() for name, rows in GROUPS.items() if name in arguments.only))


def keep(path: Path, machine: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows of a run, the file anew after each, so that a run that is cut short keeps what it had."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        write(path, {"machine": machine, "rows": found})


if __name__ == "__main__":
    main()
