"""The ``low_rank`` row and ``tnc::low_rank``: ``y = L (R x)`` in one launch on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.kernels.launch import INTERPRETED, counters, early, multiprocessors, on_its_device, overlaps, tile_of, unsuited
from tnc.kernels.low_rank_kernels import low_rank_tile, low_rank_vector
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.kernels.tuned import predicted, tuned
from tnc.terms import Expression, LowRank

VECTOR_TOKENS = 2
TILE_TOKENS = 32  # beyond, two cuBLAS products
MOST_RANK = 2048


@on_its_device
def vector(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """One or two tokens by float32 FMA."""
    (rows, rank), columns, tokens = left.shape, right.shape[1], x.shape[0]
    config = tuned("low_rank_vector", x.device, rows=rows, columns=columns, rank=rank, tokens=tokens)
    across = min(config["across"], tile_of(rank))
    padded = math.ceil(rank / across) * across
    producers, blocks = math.ceil(padded / config["ranks"]), math.ceil(rows / config["rows"])
    stride = min(blocks, config["programs"] * multiprocessors(x.device))
    y = x.new_empty(tokens, rows)
    t = torch.empty(tokens, padded, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    low_rank_vector[(producers + stride,)](
        x, left, right, t, counters(x.device).take(2), y, rows, rank, tokens, columns, padded, config["ranks"],
        min(4096, tile_of(columns)), producers, config["rows"], across, stride, stride < blocks, pdl,
        num_warps=config["warps"], **early(pdl),
    )  # fmt: skip
    return y


@on_its_device
def tile(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Up to 32 tokens by tensor cores."""
    (rows, rank), columns, tokens = left.shape, right.shape[1], x.shape[0]
    config = tuned("low_rank_tile", x.device, rows=rows, columns=columns, rank=rank, tokens=tokens)
    across, block = min(config["across"], tile_of(rank)), tile_of(tokens)
    padded = math.ceil(rank / across) * across
    ranks, chunks = min(64, across), min(config["chunks"], math.ceil(columns / 64))
    producers = padded // ranks * chunks
    y, t = x.new_empty(tokens, rows), x.new_empty(block, padded)
    parts = torch.empty(chunks * block * padded, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    low_rank_tile[(producers + math.ceil(rows / config["rows"]),)](
        x, left, right, t, parts, counters(x.device).take(2 + producers), y, tokens, rows, rank, block, columns, padded,
        ranks, chunks, producers, config["rows"], across, INTERPRETED or x.dtype == torch.float32, pdl,
        num_warps=config["warps"], **early(pdl),
    )  # fmt: skip
    return y


@torch.library.custom_op("tnc::low_rank", mutates_args=())
def low_rank(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``x (L R)^T`` for x (tokens, in_features)."""
    tokens, (rows, rank) = x.shape[0], left.shape
    if tokens == 0 or rank == 0 or rows == 0 or x.shape[1] == 0:
        return x.new_zeros(tokens, rows)
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    x, left, right = x.contiguous(), left.contiguous(), right.contiguous()
    if tokens <= VECTOR_TOKENS and x.dtype != torch.float64:
        return vector(x, left, right)
    if tokens <= TILE_TOKENS and narrow:
        return tile(x, left, right)
    return linear(linear(x, right.to(x.dtype)), left.to(x.dtype))


@low_rank.register_fake
def _(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], left.shape[0])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    x, left, right = ctx.saved_tensors
    inner = grad @ left.to(x.dtype)  # (tokens, rank)
    to_left = (grad.T @ linear(x, right.to(x.dtype))).to(left.dtype)
    return inner @ right.to(x.dtype), to_left, (inner.T @ x).to(right.dtype)


low_rank.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class OneLaunch:
    """The kernel bound to a `LowRank` of these sizes."""

    rows: int
    columns: int
    rank: int

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``."""
        *batch, columns = x.shape
        y: Tensor = low_rank(x.reshape(math.prod(batch), columns), tensors["left"], tensors["right"])
        return y.reshape(*batch, y.shape[-1])

    def microseconds(self, tokens: int, device: torch.device) -> float | None:
        """Predicted time of the launch; ``None`` where it is two products."""
        if device.type != "cuda" or not 0 < tokens <= TILE_TOKENS:
            return None
        kernel = "low_rank_vector" if tokens <= VECTOR_TOKENS else "low_rank_tile"
        return predicted(kernel, device, rows=self.rows, columns=self.columns, rank=self.rank, tokens=tokens)

    def describe(self) -> str:
        """What runs, by tokens."""
        return f"up to {TILE_TOKENS} tokens: L (R x) in one launch; more: two multiplications"


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    if not isinstance(operator, LowRank):
        return "it runs one low-rank term"
    if operator.rank > MOST_RANK:
        return f"rank {operator.rank} is above {MOST_RANK}, where two multiplications are as fast"
    return None


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression) -> OneLaunch:
    """The kernel; everything else is in the tensors."""
    assert isinstance(operator, LowRank), "refused before"
    return OneLaunch(*operator.shape, operator.rank)


register_kernel(Kernel("low_rank", _serves, bind, priority=50))
