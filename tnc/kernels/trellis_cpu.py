"""The ``trellis_cpu`` row and ``tnc::trellis_cpu``: a trellis-coded weight times x on CPU, in C built on first use.

To 32 tokens states are cut out of the words and become levels in registers, a few integer operations each, and meet
four tokens there; for more, rows are rebuilt a block at a time and multiplied. Both sum in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tnc.compiled import call, library, missing
from tnc.formats import TrellisFormat
from tnc.kernels import trellis_words
from tnc.kernels.table import Kernel, Tensors, register_kernel
from tnc.kernels.trellis_words import UNITS, TrellisWords
from tnc.terms import Expression, Quantized

TOKENS = 32  # tokens up to which states are decoded in registers, once for every `_TOGETHER`
LEAST = 2**14  # weights from which building C code is worth a second
_TOGETHER = 4  # tokens of one pass
_BLOCK = 2**23  # bytes of rows rebuilt at a time
_VECTOR = 16  # lines that share a mark: W of the C code
_CODES = ("1mad", "3inst")  # CODE of the C code


def _c_code(words: TrellisWords) -> tuple[str, ...]:
    """What `library` takes: the source, and the flags of a format."""
    format = words.format
    settings = {"BITS": format.bits, "SKEW": words.skew, "CODE": _CODES.index(format.code)}
    return "kernels/trellis_cpu.c", *(f"-D{name}={value}" for name, value in settings.items())


def _call(name: str, words: TrellisWords, tensors: tuple[Tensor, ...], *sizes: int) -> None:
    weight = words.rows, words.columns, words.lines, words.format.state_bits
    call(library(*_c_code(words)), name, tensors, *sizes, *weight, torch.get_num_threads())


def _dot(x: Tensor, stream: Tensor, marks: Tensor, seams: Tensor, steps: Tensor, words: TrellisWords) -> Tensor:
    """1 to `TOKENS` tokens, float32."""
    tokens = len(x) if len(x) <= 2 else -(-len(x) // _TOGETHER) * _TOGETHER
    wide = pad(x, (words.skew * words.unit, words.lines - words.columns, 0, tokens - len(x)))
    y = x.new_empty(tokens, words.rows)
    for some, out in zip(torch.split(wide, _TOGETHER), torch.split(y, _TOGETHER), strict=True):
        _call("tnc_trellis_dot", words, (stream, marks, seams, steps, some, out), len(some), wide.shape[1])
    return y[: len(x)]


def _blocks(
    stream: Tensor, marks: Tensor, seams: Tensor, steps: Tensor, words: TrellisWords, dtype: torch.dtype
) -> Iterator[Tensor]:
    """The matrix in ``dtype``, a block of rows at a time; one buffer serves all blocks."""
    count = max(min(_BLOCK // (4 * words.columns * words.unit), words.units), 1)
    buffer = torch.empty(count * words.unit, words.columns)
    for first in range(0, words.units, count):
        last = min(first + count, words.units)
        _call("tnc_trellis_rebuild", words, (stream, marks, seams, steps, buffer), first, last)
        yield buffer[: min(last * words.unit, words.rows) - first * words.unit].to(dtype)


def _words(steps: Tensor, columns: int, bits: int, state_bits: int, code: str, path: str) -> TrellisWords:
    return TrellisWords(TrellisFormat(bits, state_bits, code, path=path), len(steps), columns, _VECTOR)


@torch.library.custom_op("tnc::trellis_cpu", mutates_args=())
def trellis_cpu(
    x: Tensor, stream: Tensor, marks: Tensor, seams: Tensor, steps: Tensor, bits: int, state_bits: int, code: str,
    path: str,
) -> Tensor:  # fmt: skip
    """``x W^T`` for x (tokens, in_features); the other tensors as `TrellisCpu.pack` makes them."""
    words = _words(steps, x.shape[1], bits, state_bits, code, path)
    if 0 < x.shape[0] <= TOKENS and x.dtype != torch.float64:
        return _dot(x.to(torch.float32), stream, marks, seams, steps, words).to(x.dtype)
    y = x.new_empty(x.shape[0], words.rows)
    at = 0
    for block in _blocks(stream, marks, seams, steps, words, x.dtype):
        y[:, at : at + len(block)] = linear(x, block)
        at += len(block)
    return y


@trellis_cpu.register_fake
def _(
    x: Tensor, stream: Tensor, marks: Tensor, seams: Tensor, steps: Tensor, bits: int, state_bits: int, code: str,
    path: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], steps.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    x, stream, marks, seams, steps, *ctx.sizes = inputs
    ctx.columns = x.shape[1]
    ctx.save_for_backward(stream, marks, seams, steps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return trellis_cpu_input_grad(grad, *ctx.saved_tensors, ctx.columns, *ctx.sizes), *(None,) * 8


@torch.library.custom_op("tnc::trellis_cpu_input_grad", mutates_args=())
def trellis_cpu_input_grad(
    grad: Tensor, stream: Tensor, marks: Tensor, seams: Tensor, steps: Tensor, columns: int, bits: int,
    state_bits: int, code: str, path: str,
) -> Tensor:  # fmt: skip
    """``grad W``: the gradient of `trellis_cpu` by x."""
    total = grad.new_zeros(grad.shape[0], columns)
    at = 0
    for block in _blocks(stream, marks, seams, steps, _words(steps, columns, bits, state_bits, code, path), grad.dtype):
        total += grad[:, at : at + len(block)] @ block
        at += len(block)
    return total


@trellis_cpu_input_grad.register_fake
def _(
    grad: Tensor, stream: Tensor, marks: Tensor, seams: Tensor, steps: Tensor, columns: int, bits: int,
    state_bits: int, code: str, path: str,
) -> Tensor:  # fmt: skip
    return grad.new_empty(grad.shape[0], columns)


trellis_cpu.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class TrellisCpu:
    """The kernel bound to a quantized term.

    Attributes:
        words: how its codes are laid out.
    """

    words: TrellisWords

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Codes as ``stream``, ``marks`` and ``seams``; scales in float32, times a constant, beside the stored ones."""
        term = self._term(tensors)
        codes = term.integer_codes()
        marks, seams = self.words.seams(codes)
        kept = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        steps = (term.scales(torch.float64)[:, 0] * UNITS[self.words.format.code]).float()
        return {**kept, "stream": self.words.words(codes), "marks": marks, "seams": seams, "steps": steps}

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`: the tensors of the operator, bit for bit."""
        own = ("stream", "marks", "seams", "steps")
        kept = {name: tensor for name, tensor in tensors.items() if name not in own}
        codes = self.words.codes(tensors["stream"])
        term = Quantized.from_codes(codes, kept["scale"], None, self.words.format, kept.get("outer"))
        return {"codes": term.codes} | kept

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``; ``tensors`` as `pack` gives them."""
        *batch, columns = x.shape
        held = (tensors[name] for name in ("stream", "marks", "seams", "steps"))
        format = self.words.format
        rows = x.reshape(prod(batch), columns)
        y: Tensor = trellis_cpu(rows, *held, format.bits, format.state_bits, format.code, format.path)
        return y.reshape(*batch, y.shape[-1])

    def describe(self) -> str:
        """What runs, by tokens."""
        more = "the weight rebuilt a block of rows at a time"
        return f"up to {TOKENS} tokens: states decoded in registers, for {_TOGETHER} tokens at a time; more: {more}"

    def _term(self, tensors: Tensors) -> Quantized:
        return Quantized(
            tensors["codes"], tensors["scale"], None, self.words.format, self.words.columns, tensors.get("outer")
        )


def refusal(operator: Expression) -> str | None:
    """Why the structure of ``operator`` cannot be served, or ``None``."""
    if not isinstance(operator, Quantized) or not isinstance(operator.format, TrellisFormat):
        return "it runs a trellis-coded term alone"
    if 0 in operator.shape:
        return "the operator is empty"
    if operator.scale.shape[-1] != 1:
        return f"a row has {operator.scale.shape[-1]} scales; it takes one"
    if operator.layout.stored != operator.in_features:
        return "the rows are padded to whole groups"
    found = trellis_words.refusal(operator.format)
    if found is None and prod(operator.shape) < LEAST:
        return f"{prod(operator.shape)} weights are fewer than {LEAST}, from where it pays"
    return found


def _serves(operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU, the tensors are on {device.type}"
    return refusal(operator) or missing(*_c_code(bind(operator).words))


def bind(operator: Expression) -> TrellisCpu:
    """The kernel for an operator that is not refused."""
    assert isinstance(operator, Quantized) and isinstance(operator.format, TrellisFormat), "refused before"
    return TrellisCpu(TrellisWords(operator.format, *operator.shape, _VECTOR))


register_kernel(Kernel("trellis_cpu", _serves, bind, priority=40))
