"""The ``qlr_cpu`` row and ``tnc::qlr_cpu``: dequant(Q) x + L (R x) on CPU, in C built on first use.

To 4 tokens codes become float32 in registers and meet x there, so a weight costs its bits of memory traffic; for more
tokens rows are rebuilt a block at a time and multiplied. Both sum in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.compiled import call, library, missing
from tnc.formats import IntFormat
from tnc.kernels.q_plus_lr import q_plus_lr
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.terms import Expression, Product, Quantized

TOKENS = 4  # tokens up to which codes are decoded in registers
LEAST = 2**20  # weights from which a layer is bound by memory, and building C code is worth a second
_CODE = "kernels/qlr_cpu.c"
LANES = {2: 8, 4: 8, 8: 16}  # bits of a code -> words in a unit
_BLOCK = 2**23  # bytes of rows rebuilt at a time


def unit_of(bits: int) -> int:
    """Columns in a unit."""
    return LANES[bits] * 32 // bits


def code_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns) as int32 words (rows, columns * bits / 32) in the order of ``qlr_cpu.c``."""
    spread = codes.to(torch.int64).reshape(codes.shape[0], -1, 32 // bits, LANES[bits])
    words = (spread << _places(bits)).sum(2).flatten(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """Inverse of `code_words`: uint8 codes (rows, columns)."""
    spread = words.reshape(words.shape[0], -1, 1, LANES[bits]).to(torch.int64) >> _places(bits)
    codes: Tensor = (spread & (2**bits - 1)).flatten(1)
    return codes.to(torch.uint8)


def _places(bits: int) -> Tensor:
    return torch.arange(0, 32, bits).unsqueeze(-1)


def _call(name: str, tensors: tuple[Tensor, ...], *sizes: int) -> None:
    call(library(_CODE), name, tensors, *sizes, torch.get_num_threads())


def _dot(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """1 to `TOKENS` tokens, float32."""
    tokens, columns = x.shape
    rows, groups = scale.shape
    sums = x.reshape(tokens, groups, -1).sum(-1)
    y = x.new_empty(tokens, rows)
    _call("tnc_dot", (x, sums, words, scale, zero, y), tokens, rows, columns, groups, bits)
    return y


def _blocks(words: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The matrix in ``dtype``, a block of rows at a time; one buffer serves all blocks."""
    (rows, groups), columns = scale.shape, words.shape[1] * 32 // bits
    if dtype == torch.float64:
        step = scale.double().unsqueeze(-1)
        codes = codes_of(words, bits).reshape(rows, groups, -1)
        yield (step * (codes.double() - zero.double().unsqueeze(-1))).reshape(rows, columns)
        return
    count = max(min(_BLOCK // (4 * columns), rows), 1)
    buffer = torch.empty(count, columns)
    for first in range(0, rows, count):
        last = min(first + count, rows)
        _call("tnc_rebuild", (words, scale, zero, buffer), first, last, columns, groups, bits)
        yield buffer[: last - first].to(dtype)


@torch.library.custom_op("tnc::qlr_cpu", mutates_args=())
def qlr_cpu(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``x dequant(Q)^T`` for x (tokens, in_features); words, scale and zero as `CpuQLR.pack` makes them."""
    if 0 < x.shape[0] <= TOKENS and x.dtype != torch.float64:
        return _dot(x.to(torch.float32).contiguous(), words, scale, zero, bits).to(x.dtype)
    y = x.new_empty(x.shape[0], scale.shape[0])
    at = 0
    for block in _blocks(words, scale, zero, bits, x.dtype):
        y[:, at : at + len(block)] = linear(x, block)
        at += len(block)
    return y


@qlr_cpu.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    _, *weights, ctx.bits = inputs
    ctx.save_for_backward(*weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return qlr_cpu_input_grad(grad, *ctx.saved_tensors, ctx.bits), None, None, None, None


@torch.library.custom_op("tnc::qlr_cpu_input_grad", mutates_args=())
def qlr_cpu_input_grad(grad: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``grad dequant(Q)``: the gradient of `qlr_cpu` by x."""
    total = grad.new_zeros(grad.shape[0], words.shape[1] * 32 // bits)
    at = 0
    for block in _blocks(words, scale, zero, bits, grad.dtype):
        total += grad[:, at : at + len(block)] @ block
        at += len(block)
    return total


@qlr_cpu_input_grad.register_fake
def _(grad: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return grad.new_empty(grad.shape[0], words.shape[1] * 32 // bits)


qlr_cpu.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class CpuQLR:
    """The kernel bound to an operator.

    Attributes:
        format: of the codes.
        columns: in_features.
        scale: dtype of the stored scales.
        base: prefix of the quantized term's tensors.
        factors: that of the low-rank term's, if there is one.
    """

    format: IntFormat
    columns: int
    scale: torch.dtype
    base: str
    factors: str | None

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Codes as ``words``; scales and zeros in float32, 64 bits a group in the place of 16 to 40."""
        codes, scale, zero = (tensors.get(self.base + name) for name in ("codes", "scale", "zero"))
        assert codes is not None and scale is not None, "the operator that was bound has them"
        term = Quantized(codes, scale, zero, self.format, self.columns)
        kept = {name: tensor for name, tensor in tensors.items() if name not in self._replaced()}
        words = code_words(term.integer_codes(), self.format.bits)
        return {**kept, "words": words, "steps": scale.float().contiguous(), "zeros": term.zeros().float().contiguous()}

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`: the tensors of the operator, bit for bit."""
        codes = codes_of(tensors["words"], self.format.bits)
        zeros = tensors["zeros"].to(torch.uint8)
        term = Quantized.from_codes(codes, tensors["steps"].to(self.scale), zeros, self.format)
        kept = {name: tensor for name, tensor in tensors.items() if name not in ("words", "steps", "zeros")}
        return {self.base + name: tensor for name, tensor in term.tensors().items()} | kept

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``; ``tensors`` as `pack` gives them."""
        *batch, columns = x.shape
        rows = x.reshape(prod(batch), columns)
        inner = None if self.factors is None else self.inner(rows, tensors)
        y = self.outer(rows, inner, tensors)
        return y.reshape(*batch, y.shape[-1])

    def right(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What R is stored as."""
        return () if self.factors is None else (tensors[f"{self.factors}right"],)

    def inner(self, x: Tensor, tensors: Tensors) -> Tensor:
        """R x: (tokens, in_features) to (tokens, rank)."""
        return linear(x, tensors[f"{self.factors}right"].to(x.dtype))

    def outer(self, x: Tensor, inner: Tensor | None, tensors: Tensors) -> Tensor:
        """The answer to x (tokens, in_features) where R x is known; ``None`` without a low-rank term."""
        y: Tensor = qlr_cpu(x, tensors["words"], tensors["steps"], tensors["zeros"], self.format.bits)
        return y if inner is None else y + linear(inner, tensors[f"{self.factors}left"].to(x.dtype))

    def describe(self) -> str:
        """What runs, by tokens."""
        low_rank = "" if self.factors is None else ", plus L (R x)"
        more = "the weight rebuilt a block of rows at a time"
        return f"up to {TOKENS} tokens: codes decoded in registers{low_rank}; more: {more}"

    def _replaced(self) -> set[str]:
        return {self.base + name for name in ("codes", "scale", "zero")}


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    parts = q_plus_lr(operator)
    if parts is None or isinstance(parts.low_rank, Product):
        return "it runs a quantized term, alone or plus one low-rank term"
    term = parts.quantized
    if not isinstance(term.format, IntFormat) or term.format.bits not in LANES:
        return f"it decodes integers of 2, 4 and 8 bits, not {term.format.describe()}"
    if not term.scale.is_floating_point() or term.scale.dtype == torch.float64 or term.outer is not None:
        return f"scales are {term.scale.dtype}; it reads 16-bit and 32-bit ones"
    unit, group = unit_of(term.format.bits), term.format.group_of(term.in_features)
    if term.layout.stored != term.in_features or group % unit:
        return f"groups of {group} in {term.in_features} columns are not a whole number of its units of {unit}"
    if prod(term.shape) < LEAST:
        return f"{prod(term.shape)} weights are fewer than {LEAST}, from where it pays"
    return None


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU, the tensors are on {device.type}"
    return refusal(operator) or missing(_CODE)


def bind(operator: Expression) -> CpuQLR:
    """The kernel for an operator that is not refused."""
    parts = q_plus_lr(operator)
    assert parts is not None and isinstance(parts.quantized.format, IntFormat), "refused before"
    term = parts.quantized
    return CpuQLR(parts.quantized.format, term.in_features, term.scale.dtype, parts.base, parts.factors)


register_kernel(Kernel("qlr_cpu", _serves, bind, priority=40))
