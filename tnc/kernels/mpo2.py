"""The ``mpo2`` row and ``tnc::mpo2``: a two-core MPO in one launch, or rebuilt at memory speed, on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.kernels.launch import INTERPRETED, counters, early, on_its_device, overlaps, tile_of, unsuited
from tnc.kernels.mpo_kernels import mpo2 as mpo2_kernel
from tnc.kernels.rebuild_kernels import rebuild_mpo2
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.kernels.tuned import tuned
from tnc.terms import Expression, Mpo

FUSED = 8192  # tokens x bond up to which the fused kernel beats rebuilding (128 tokens at bond 64)
MOST_MODE = 128
BLOCK = 64  # of the bond, multiplied at a time when the matrix is rebuilt


@on_its_device
def fused(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """X (tokens, in_features) through cores (1, o1, i1, D) and (D, o2, i2, 1)."""
    (_, o1, i1, bond), (_, o2, i2, _) = first.shape, second.shape
    tokens = x.shape[0]
    config = tuned("mpo2", x.device, rows=o1 * o2, columns=i1 * i2, rank=bond, tokens=tokens)
    together = min(config["tokens_a_program"], tokens)
    outputs = min(config["outputs"], tile_of(o2))
    slices = min(config["slices"], bond)
    depth = math.ceil(bond / slices)
    slices = math.ceil(bond / depth)
    blocks = math.ceil(o2 / outputs) * math.ceil(tokens / together)
    wide = tile_of(o1)
    y = x.new_empty(tokens, o1 * o2)
    slab = torch.empty(blocks * slices * together * outputs * wide, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    mpo2_kernel[(blocks * slices,)](
        x, first[0].permute(2, 1, 0).contiguous(), second.contiguous(), slab, counters(x.device).take(blocks), y,
        tokens, o1, o2, i1, i2, bond, wide, tile_of(i1), tile_of(i2), outputs, together, depth, slices,
        INTERPRETED or x.dtype == torch.float32, pdl, num_warps=config["warps"], num_stages=config["stages"],
        **early(pdl),
    )  # fmt: skip
    return y


@on_its_device
def rebuild(first: Tensor, second: Tensor) -> Tensor:
    """The matrix (o1 o2, i1 i2), summed in float32 and rounded once to the cores' dtype.

    The first core is read as it lies in memory, whatever its strides.
    """
    (_, o1, i1, bond), (_, o2, i2, _) = first.shape, second.shape
    config = tuned("rebuild_mpo2", first.device, rows=o1 * o2, columns=i1 * i2, rank=bond)
    weight = first.new_empty(o1 * o2, i1 * i2)
    wide = min(config["wide"], tile_of(o1, least=1))
    high = max(min(config["high"], tile_of(i1, least=1)), 16 // wide)
    deep = tile_of(bond)
    pdl = overlaps(first.device)
    rebuild_mpo2[(math.ceil(o1 / wide), math.ceil(o2 / config["outputs"]), math.ceil(i1 / high))](
        first, second.contiguous(), weight, o1, i1, o2, i2, bond, *first.stride()[1:], wide, high, tile_of(i2),
        min(BLOCK, deep), deep, config["outputs"], INTERPRETED or first.dtype == torch.float32, pdl,
        num_warps=config["warps"], num_stages=rebuild_stages(bond, config["stages"]), **early(pdl),
    )  # fmt: skip
    return weight


def rebuild_stages(bond: int, stages: int) -> int:
    """Stages for a bond: every block of a deeper one has buffers of its own, 296 kB in three stages at bond 208."""
    return stages if bond <= BLOCK else 1


def _dense(first: Tensor, second: Tensor) -> Tensor:
    (_, o1, i1, _), (_, o2, i2, _) = first.shape, second.shape
    return torch.einsum("yaid,dbjz->abij", first, second).reshape(o1 * o2, i1 * i2)


@torch.library.custom_op("tnc::mpo2", mutates_args=())
def mpo2(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``x W^T`` for x (tokens, in_features) and W the MPO of two cores."""
    tokens, bond = x.shape[0], second.shape[0]
    if tokens == 0 or bond == 0:
        return x.new_zeros(tokens, first.shape[1] * second.shape[1])
    first, second = first.to(x.dtype), second.to(x.dtype)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return linear(x, _dense(first, second))
    if tokens * bond <= FUSED:
        return fused(x.contiguous(), first, second)
    return linear(x, rebuild(first, second))


@mpo2.register_fake
def _(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], first.shape[1] * second.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """Through the matrix: no intermediate has more entries than it or ``x``."""
    x, first, second = ctx.saved_tensors
    narrow, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    a, b = first[0].to(wide), second[..., 0].to(wide)  # (o1, i1, D), (D, o2, i2)
    to_x = grad @ _dense(first.to(wide), second.to(wide)).to(narrow)
    to_weight = (grad.T @ x).to(wide).reshape(a.shape[0], b.shape[1], a.shape[1], b.shape[2])
    to_first = torch.einsum("abij,dbj->aid", to_weight, b).unsqueeze(0)
    to_second = torch.einsum("abij,aid->dbj", to_weight, a).unsqueeze(-1)
    return to_x, to_first.to(first.dtype), to_second.to(second.dtype)


mpo2.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class TwoCores:
    """The kernel bound to a two-core `Mpo`; it wants the first core bond-major in memory (`pack`), strides aside.

    Attributes:
        names: of the two cores in the operator.
    """

    names: tuple[str, str]

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """The first core with its memory in the order (D, i1, o1), same shape and values."""
        first = tensors[self.names[0]]
        return {**tensors, self.names[0]: first.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)}

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """The first core contiguous again."""
        return {**tensors, self.names[0]: tensors[self.names[0]].contiguous()}

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``."""
        *batch, columns = x.shape
        first, second = (tensors[name] for name in self.names)
        y: Tensor = mpo2(x.reshape(math.prod(batch), columns), first, second)
        return y.reshape(*batch, y.shape[-1])

    def describe(self) -> str:
        """What runs, by tokens."""
        return (
            f"up to tokens x bond = {FUSED}: both cores in one launch; more: the matrix rebuilt at memory speed, then "
            "one multiplication"
        )


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    if not isinstance(operator, Mpo) or len(operator.cores) != 2:
        return "it runs an MPO of two cores"
    if operator.padded:
        return "the modes are padded"
    modes = operator.out_modes + operator.in_modes
    if max(modes) > MOST_MODE or min(modes) < 1:
        return f"modes {modes} do not all lie between 1 and {MOST_MODE}"
    return None


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    return unsuited(device) or refusal(operator)


def bind(operator: Expression) -> TwoCores:
    """The kernel for an operator that is not refused."""
    first, second = operator.tensors()
    return TwoCores((first, second))


register_kernel(Kernel("mpo2", _serves, bind, priority=50))
