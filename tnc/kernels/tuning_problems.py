"""What `tnc.kernels.tuning` times: every tiled kernel on random weights, for the tokens and bits tiles depend on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tnc.formats import TrellisFormat
from tnc.kernels import low_rank, mpo2, mpo3, qlr_launch, trellis_launch
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.trellis_launch import Coded
from tnc.kernels.trellis_ops import stream_of
from tnc.kernels.tuning import Call, Problem, register_problems
from tnc.kernels.words import group_words, unit_of

Sizes = dict[str, int]
_DTYPE = torch.bfloat16
_CLASSES: tuple[tuple[str, Sizes], ...] = (
    *(("qlr_vector", {"rank": 64, "bits": bits, "tokens": 1}) for bits in (4, 2, 3, 8)),
    ("qlr_vector", {"rank": 64, "bits": 4, "tokens": 2}),
    *(("qlr_tile", {"rank": 64, "bits": bits, "tokens": 16}) for bits in (4, 2, 3, 8)),
    ("qlr_tile", {"rank": 64, "bits": 4, "tokens": 32}),
    ("rebuild_qlr", {"rank": 64, "bits": 4}),
    ("low_rank_vector", {"rank": 512, "tokens": 1}),
    ("low_rank_tile", {"rank": 512, "tokens": 16}),
    *(("mpo2", {"rank": 64, "tokens": tokens}) for tokens in (1, 16)),
    ("rebuild_mpo2", {"rank": 64}),
    *(("mpo3", {"rank": 32, "tokens": tokens}) for tokens in (1, 16)),
    *(("trellis_vector", {"rank": 0, "bits": bits, "tokens": 1}) for bits in (2, 3, 4)),
    *(("trellis_tile", {"rank": 0, "bits": bits, "tokens": 16}) for bits in (2, 3, 4)),
    ("rebuild_trellis", {"rank": 0, "bits": 2}),
)


def problems(device: torch.device, rows: int, columns: int) -> Iterator[Problem]:
    """Every kernel of `_CLASSES` at a shape (out_features, in_features)."""
    for kernel, sizes in _CLASSES:
        whole = {"rows": rows, "columns": columns, **sizes}
        yield Problem(kernel, whole, partial(_LAUNCHES[kernel], device, whole))


def _normal(device: torch.device, *shape: int) -> Tensor:
    return (torch.randn(*shape, device=device) / math.sqrt(shape[-1])).to(_DTYPE)


def _packed(device: torch.device, sizes: Sizes) -> Packed:
    rows, columns, rank, bits = (sizes[name] for name in ("rows", "columns", "rank", "bits"))
    group = 128 if columns % 128 == 0 else -(-columns // unit_of(bits)) * unit_of(bits)
    units, groups = math.ceil(columns / unit_of(bits)), math.ceil(columns / group)
    low, high = (
        torch.randint(-(2**31), 2**31 - 1, (units, rows, width), dtype=torch.int32, device=device) for width in (16, 8)
    )
    scale = torch.rand(rows, groups, device=device).to(_DTYPE) / 2**bits / columns**0.5
    words = group_words(scale, torch.randint(0, 2**bits, (rows, groups), device=device))
    left, right = _normal(device, rows, rank), _normal(device, rank, columns)
    return Packed(low, high if bits == 3 else low, words, left, right, bits, group, "brain")


def _coded(device: torch.device, sizes: Sizes) -> Coded:
    rows, columns, bits = (sizes[name] for name in ("rows", "columns", "bits"))
    format = TrellisFormat(bits, path="diagonal")
    codes = torch.randint(0, 1 << bits, (rows, columns), device=device).to(torch.uint8)
    held = stream_of(rows, columns, format).pack(codes)
    steps = torch.rand(rows, device=device) / 148 / columns**0.5
    left, right = _normal(device, rows, 1)[:, :0], _normal(device, 1, columns)[:0]
    stream, firsts, items, fixes = (held[name] for name in ("stream", "firsts", "items", "fixes"))
    return Coded(stream, firsts, items, fixes, steps, left, right, bits, format.state_bits, format.length)


def _cores(device: torch.device, sizes: Sizes, count: int) -> list[Tensor]:
    """Cores of one bond dimension; of two the first bond-major in memory, as modules hold it."""
    outs, ins, bond = _modes(sizes["rows"], count), _modes(sizes["columns"], count), sizes["rank"]
    bonds = (1, *(bond,) * (count - 1), 1)
    cores = [_normal(device, bonds[k], outs[k], ins[k], bonds[k + 1]) for k in range(count)]
    return [cores[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), cores[1]] if count == 2 else cores


def _modes(size: int, count: int) -> tuple[int, ...]:
    """So many factors, as alike as a greedy choice makes them, the smallest first."""
    if count == 1:
        return (size,)
    small = max(n for n in range(1, round(size ** (1 / count)) + 1) if size % n == 0)
    return small, *_modes(size // small, count - 1)


def _x(device: torch.device, sizes: Sizes) -> Tensor:
    return _normal(device, sizes["tokens"], sizes["columns"])


def _factors(device: torch.device, sizes: Sizes) -> tuple[Tensor, Tensor]:
    return _normal(device, sizes["rows"], sizes["rank"]), _normal(device, sizes["rank"], sizes["columns"])


_LAUNCHES: dict[str, Callable[[torch.device, Sizes], Call]] = {
    "qlr_vector": lambda device, sizes: partial(qlr_launch.vector, _x(device, sizes), _packed(device, sizes)),
    "qlr_tile": lambda device, sizes: partial(qlr_launch.tile, _x(device, sizes), _packed(device, sizes)),
    "rebuild_qlr": lambda device, sizes: partial(qlr_launch.rebuild, _packed(device, sizes), _DTYPE),
    "low_rank_vector": lambda device, sizes: partial(low_rank.vector, _x(device, sizes), *_factors(device, sizes)),
    "low_rank_tile": lambda device, sizes: partial(low_rank.tile, _x(device, sizes), *_factors(device, sizes)),
    "mpo2": lambda device, sizes: partial(mpo2.fused, _x(device, sizes), *_cores(device, sizes, 2)),
    "rebuild_mpo2": lambda device, sizes: partial(mpo2.rebuild, *_cores(device, sizes, 2)),
    "mpo3": lambda device, sizes: partial(mpo3.fused, _x(device, sizes), *_cores(device, sizes, 3)),
    "trellis_vector": lambda device, sizes: partial(trellis_launch.vector, _x(device, sizes), _coded(device, sizes)),
    "trellis_tile": lambda device, sizes: partial(trellis_launch.tile, _x(device, sizes), _coded(device, sizes)),
    "rebuild_trellis": lambda device, sizes: partial(trellis_launch.rebuild, _coded(device, sizes), _DTYPE),
}

register_problems(problems)
