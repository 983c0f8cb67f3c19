"""The ``mpo3`` row and ``tnc::mpo3``: a three-core MPO in one launch on a GPU, for few tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnc.kernels import mpo
from tnc.kernels.launch import INTERPRETED, counters, early, on_its_device, overlaps, tile_of, unsuited
from tnc.kernels.mpo3_kernels import mpo3 as mpo3_kernel
from tnc.kernels.table import Bound, Kernel, Tensors, register_kernel
from tnc.kernels.tuned import tuned
from tnc.terms import Expression, Mpo

FUSED_TOKENS = 256  # beyond, the planned ways of the ``mpo`` row
MOST_MERGED = 2**14  # entries of a merged core, and of a step of x, that a program holds
MOST_MODE, MOST_BOND = 32, 64


def fused(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """X (tokens, in_features) through cores (1, o1, i1, A), (A, o2, i2, B) and (B, o3, i3, 1)."""
    (_, o1, i1, a), (_, o2, i2, b), (_, o3, i3, _) = first.shape, second.shape, third.shape
    sizes = {"rows": o1 * o2 * o3, "columns": i1 * i2 * i3, "rank": max(a, b), "tokens": x.shape[0]}
    return launched(x, first, second, third, tuned("mpo3", x.device, **sizes))


@on_its_device
def launched(x: Tensor, first: Tensor, second: Tensor, third: Tensor, config: dict[str, int]) -> Tensor:
    """`fused` with a tile: bonds a program merges, tokens a step, steps, warps, stages."""
    (_, o1, i1, a), (_, o2, i2, b), (_, o3, i3, _) = first.shape, second.shape, third.shape
    tokens = x.shape[0]
    wide, high, deep, into = tile_of(o1), tile_of(o3), tile_of(i3), tile_of(i1)
    inner = tile_of(i2) * deep
    bonds = min(config["bonds"], tile_of(a, least=1), MOST_MERGED // (high * inner))
    room = max(MOST_MERGED // (into * inner), 1)
    together = min(config["tokens_a_step"], tile_of(tokens, least=1), room)
    steps = min(config["steps"], math.ceil(tokens / together))
    slices, blocks = math.ceil(a / bonds), o2 * math.ceil(tokens / (together * steps))
    y = x.new_empty(tokens, o1 * o2 * o3)
    size = steps * together * high * wide
    slab = torch.empty(blocks * slices * size if slices > 1 else 1, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    mpo3_kernel[(blocks * slices,)](
        x, first.contiguous(), second.contiguous(), third.contiguous(), slab, counters(x.device).take(blocks), y,
        tokens, o1, o2, o3, i1, i2, i3, a, b, wide, high, into, inner // deep, deep, tile_of(b), bonds, together, steps,
        slices, config["stages"], INTERPRETED or x.dtype == torch.float32, pdl, num_warps=config["warps"],
        **early(pdl),
    )  # fmt: skip
    return y


@torch.library.custom_op("tnc::mpo3", mutates_args=())
def mpo3(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """``x W^T`` for x (tokens, in_features) and W the MPO of three cores."""
    rows = first.shape[1] * second.shape[1] * third.shape[1]
    if x.numel() == 0 or 0 in second.shape:
        return x.new_zeros(x.shape[0], rows)
    return fused(x.contiguous(), first.to(x.dtype), second.to(x.dtype), third.to(x.dtype))


@mpo3.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], first.shape[1] * second.shape[1] * third.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
    x, *cores = ctx.saved_tensors
    a, b, c = (core.to(x.dtype) for core in cores)
    a, c = a[0], c[..., 0]  # (o1, i1, A), (B, o3, i3)
    g = torch.unflatten(grad, 1, (a.shape[0], b.shape[1], c.shape[1]))
    v = torch.unflatten(x, 1, (a.shape[1], b.shape[2], c.shape[2]))
    left = torch.einsum("topq,oia->tiapq", g, a)  # what the cores to the right of a bond receive
    right = torch.einsum("tijk,bqk->tijbq", v, c)  # and those to its left
    middle = torch.einsum("tiapq,apjb->tijbq", left, b)
    to_x = torch.einsum("tijbq,bqk->tijk", middle, c).flatten(1)
    to_first = torch.einsum("tijbq,apjb,topq->oia", right, b, g).unsqueeze(0)
    to_second = torch.einsum("tijbq,tiapq->apjb", right, left)
    to_third = torch.einsum("tijbq,tijk->bqk", middle, v).unsqueeze(-1)
    return to_x, *(d.to(core.dtype) for d, core in zip((to_first, to_second, to_third), cores, strict=True))


mpo3.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class ThreeCores:
    """The kernel bound to a three-core `Mpo`; it reads the cores as they are stored.

    Attributes:
        names: of the three cores in the operator.
        planned: what runs for more tokens, and for dtypes other than 16-bit ones.
    """

    names: tuple[str, str, str]
    planned: Bound

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``."""
        *batch, columns = x.shape
        tokens = math.prod(batch)
        if tokens > FUSED_TOKENS or x.dtype not in (torch.float16, torch.bfloat16):
            return self.planned(x, tensors)
        first, second, third = (tensors[name] for name in self.names)
        y: Tensor = mpo3(x.reshape(tokens, columns), first, second, third)
        return y.reshape(*batch, y.shape[-1])

    def describe(self) -> str:
        """What runs, by tokens."""
        return (
            f"up to {FUSED_TOKENS} tokens in 16 bits: three cores in one launch; more, and other dtypes: "
            f"{self.planned.describe()}"
        )


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    if not isinstance(operator, Mpo) or len(operator.cores) != 3:
        return "it runs an MPO of three cores"
    if operator.padded:
        return "the modes are padded"
    modes, (a, b) = operator.out_modes + operator.in_modes, operator.ranks[1:-1]
    if max(modes) > MOST_MODE or min(modes) < 1:
        return f"modes {modes} do not all lie between 1 and {MOST_MODE}"
    if not 1 <= min(a, b) <= max(a, b) <= MOST_BOND:
        return f"bonds {a}, {b} do not both lie between 1 and {MOST_BOND}"
    merged = tile_of(operator.out_modes[2]) * tile_of(operator.in_modes[1]) * tile_of(operator.in_modes[2])
    if merged > MOST_MERGED:
        return f"o3 i2 i3 pad to {merged}, above {MOST_MERGED}: cores 2 and 3, merged, do not fit a program"
    return None


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression) -> ThreeCores:
    """The kernel for an operator that is not refused."""
    first, second, third = operator.tensors()
    return ThreeCores((first, second, third), mpo.bind(operator))


register_kernel(Kernel("mpo3", _serves, bind, priority=50))
