"""`FactoredLinear`: an expression as a drop-in for ``torch.nn.Linear``. Tensors, bias, kernel; no maths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnc.errors import ShapeError
from tnc.kernels import Bound, Repacking, choose
from tnc.modules.checks import check_bias, check_one_device
from tnc.modules.siblings import Siblings
from tnc.modules.stored import Tie, copied, expected_dtype, named_tensors, packed_name, relayout
from tnc.terms import Expression, Product, Sum, from_spec

# asked here, because torch.compile of torch 2.11 cannot trace the question
_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


class FactoredLinear(nn.Module):
    """``y = x W^T + bias`` with ``W`` kept as the tensors of an expression.

    Every tensor of ``operator.tensors()`` is copied and stored under its name with ``.`` replaced by ``_``
    (``0.codes`` of a sum becomes ``0_codes``); these names and ``bias`` are the keys of ``state_dict()``.
    Floating tensors are parameters; integer tensors, and codes, scales and zeros of `Quantized`, are buffers.

    The stored tensors and the bias keep their dtype under ``.half()``, ``.to(torch.bfloat16)`` and the like,
    only their device follows: neither the storage bits nor the error can change unnoticed. The output has the
    dtype of ``x``, whatever is stored. The kernel is chosen when the module is built, moved, or loaded onto
    another device.

    A kernel may want codes in a layout of its own (`tnc.kernels.Repacking`). Then the module keeps that layout *in
    the place of* the buffers, not beside them, so memory is not doubled; ``state_dict()``, ``operator`` and every
    move unpack the tensors bit for bit, and ``load_state_dict()`` takes them as ever.

    Args:
        operator: the expression, (out_features, in_features).
        bias: (out_features,) or ``None``; copied. It is added in the dtype of ``x``.
        backend: ``"auto"`` or the name of a kernel (`tnc.kernels.backends`).

    Raises:
        ShapeError: if ``bias`` is not a floating vector (out_features,).
        BackendError: if the backend is unknown or cannot serve the operator, or if the tensors of the
            operator and the bias are not all on one device.
    """

    bias: nn.Parameter | None
    report: dict[str, Any] | None  # what the decomposition cost, as `tnc.compress` found it

    def __init__(self, operator: Expression, bias: Tensor | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        self.report = None
        check_bias(bias, operator)
        check_one_device(operator, bias)
        self._spec = operator.spec()
        self._shape = operator.shape
        self._backend = backend
        self._bits = operator.storage_bits
        self._repacked = False  # whether the tensors are in the kernel's layout
        self._packed: tuple[str, ...] = ()  # names of those that stand in the place of the operator's
        self._ties: dict[str, Tie] = {}
        self._siblings: Siblings | None = None
        self._place = 0  # among the siblings
        self._stored = {name: name.replace(".", "_") for name in operator.tensors()}
        assert len(set(self._stored.values())) == len(self._stored), "stored names must differ"
        for name, tensor, trainable in named_tensors(operator):
            self._store(self._stored[name], tensor, trainable)
        self.register_parameter("bias", None if bias is None else nn.Parameter(copied(bias)))
        self._dtype = expected_dtype(operator, bias)
        self._bind()

    @classmethod
    def from_linear(cls, linear: nn.Module, operator: Expression, *, backend: str = "auto") -> FactoredLinear:
        """The stand-in for ``linear`` with ``operator`` in the place of its weight.

        Takes over a copy of the bias (if any), training mode, and whether weight and bias are trainable.

        Args:
            linear: ``torch.nn.Linear``, or transformers' ``Conv1D`` (weight (in, out), attribute ``nf``).
            operator: (out_features, in_features) of ``linear``.
            backend: see the class.

        Raises:
            ShapeError: if ``linear`` has no weight matrix, or its shape is not that of ``operator``.
            BackendError: see the class.
        """
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ShapeError(
                f"FactoredLinear.from_linear got {type(linear).__name__} without a weight matrix; expected "
                "torch.nn.Linear or transformers' Conv1D."
            )
        shape = (weight.shape[1], weight.shape[0]) if hasattr(linear, "nf") else tuple(weight.shape)
        if operator.shape != shape:
            raise ShapeError(
                f"FactoredLinear.from_linear got an operator of shape {operator.shape} for "
                f"{type(linear).__name__} of shape {shape} (out_features, in_features); use the operator "
                "made from its weight."
            )
        bias = getattr(linear, "bias", None)
        module = cls(operator, bias, backend=backend)
        module.requires_grad_(weight.requires_grad)
        if module.bias is not None and bias is not None:
            module.bias.requires_grad_(bias.requires_grad)
        module._expect(weight.dtype)
        return module.train(linear.training)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self._shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self._shape[0]

    @property
    def operator(self) -> Expression:
        """The expression rebuilt from the current tensors, which it shares with the module unless they are repacked."""
        return from_spec(self._spec, self._portable())

    @property
    def storage_bits(self) -> int:
        """Bits stored in the place of the weight; the bias is not counted."""
        return self._bits

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias``: (..., in_features) to (..., out_features), in the dtype of ``x``.

        Under ``torch.autocast`` ``x`` is taken, and the output given, in its dtype, as `torch.nn.Linear` does.

        Raises:
            ShapeError: if ``x`` is not floating point or its last size is not ``in_features``.
        """
        if x.ndim == 0 or x.shape[-1] != self._shape[1] or not x.is_floating_point():
            raise ShapeError(
                f"FactoredLinear got x of shape {tuple(x.shape)} and {x.dtype}; expected floating point "
                f"(..., in_features={self._shape[1]}). Pass the activations that the dense layer took."
            )
        kind = x.device.type
        if kind in _AUTOCAST and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            cast = x.to(torch.get_autocast_dtype(kind))
            with torch.autocast(kind, enabled=False):  # kernels choose the dtype of every step themselves
                return self._applied(cast, x)
        return self._applied(x, x)

    def _applied(self, x: Tensor, given: Tensor) -> Tensor:
        """The answer to x; siblings know it by the tensor that was given, if it is that one."""
        y = None
        if self._siblings is not None and not torch.compiler.is_compiling() and x is given:
            y = self._siblings.answer(self._place, self, x)
        if y is None:
            y = self._kernel(x, self._tensors())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves the layer."""
        return next(c.name for c in self._candidates if c.chosen)

    @property
    def bound_kernel(self) -> Bound:
        """The kernel bound to the operator: another object whenever the layer was bound anew."""
        return self._kernel

    def bound(self) -> tuple[Bound, dict[str, Tensor]]:
        """The kernel bound to the operator, and the very tensors it is called with, in its own layout."""
        return self._kernel, self._tensors()

    def explain(self) -> str:
        """Text for people: the expression, its size, each kernel and why it was chosen or not."""
        rows, columns = self._shape
        bits = self.storage_bits
        lines = [
            f"FactoredLinear({columns} -> {rows}): {_outline(self.operator)}",
            f"  stored: {bits} bits, {bits / max(rows * columns, 1):.4g} bits per weight",
            f"  kernels for backend={self._backend!r}, {self._device()}, {_short(self._dtype)}:",
        ]
        for candidate in self._candidates:
            verdict = "chosen" if candidate.chosen else "passed over"
            lines.append(f"    {candidate.name}: {verdict}: {candidate.reason}")
            if candidate.chosen:
                lines.append(f"      {self._kernel.describe()}")
        if self._siblings is not None:
            lines.append(f"  {self._siblings.describe()}")
        return "\n".join(lines)

    def extra_repr(self) -> str:
        """Sizes, expression and kernel, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, operator={_outline(self.operator)}, kernel={self.kernel}"
        )

    def hold(self, name: str, tensor: Tensor, tie: Tie | None = None) -> None:
        """Hold an equal tensor that other layers hold too, in the place of the one stored under ``name``.

        A parameter stays one through every move by itself; a buffer does with the ``tie`` that its holders share.
        """
        self._unpack()
        setattr(self, self._stored[name], tensor)
        if tie is not None:
            self._ties[self._stored[name]] = tie
        self._bind()

    @property
    def siblings(self) -> Siblings | None:
        """The group of layers that are called with the same input, if the layer is in one."""
        return self._siblings

    def join(self, siblings: Siblings | None, place: int = 0) -> None:
        """Be the layer at ``place`` of a group, or of none."""
        self._siblings, self._place = siblings, place
        if siblings is not None:
            siblings.join(place, self)

    def expects(self) -> torch.dtype:
        """Dtype expected of ``x``."""
        return self._dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy joins the copy of the group."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.join(self._siblings, self._place)

    def _store(self, name: str, tensor: Tensor, trainable: bool) -> None:
        if trainable:
            self.register_parameter(name, nn.Parameter(copied(tensor)))
        else:
            self.register_buffer(name, copied(tensor))

    def _tensors(self) -> dict[str, Tensor]:
        """What the kernel is called with: the operator's tensors, or the kernel's own layout."""
        held = {name: getattr(self, stored) for name, stored in self._stored.items()}
        kept = {name: tensor for name, tensor in held.items() if tensor is not None}
        return kept | {name: getattr(self, packed_name(name)) for name in self._packed}

    def _portable(self) -> dict[str, Tensor]:
        """The operator's tensors."""
        held = self._tensors()
        return self._kernel.unpack(held) if self._repacked and isinstance(self._kernel, Repacking) else held

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self._tensors().values()), torch.device("cpu"))

    def _expect(self, dtype: torch.dtype) -> None:
        self._unpack()
        self._dtype = dtype
        self._bind()

    def _bind(self) -> None:
        if self._siblings is not None:
            self._siblings.changed()
        self._bound_device = self._device()
        operator = from_spec(self._spec, self._tensors())
        self._kernel, self._candidates = choose(operator, self._bound_device, self._dtype, backend=self._backend)
        if not isinstance(self._kernel, Repacking):
            return
        packed = self._kernel.pack(self._tensors())
        tied = {name: stored for name, stored in self._stored.items() if stored in self._ties}
        if all(packed.get(name) is getattr(self, stored) for name, stored in tied.items()):
            self._hold_packed(packed)
        else:  # a layout of one layer would part what several share
            self._kernel, self._candidates = choose(operator, self._bound_device, self._dtype, backend="einsum")

    def _hold_packed(self, packed: dict[str, Tensor]) -> None:
        """Hold the kernel's layout in the place of the buffers that it replaces."""
        for name, stored in self._stored.items():
            if name not in packed:
                self.register_buffer(stored, None)
            else:
                relayout(getattr(self, stored), packed[name])
        self._packed = tuple(name for name in packed if name not in self._stored)
        self._repacked = True
        for name in self._packed:
            self.register_buffer(packed_name(name), packed[name], persistent=False)
        for stored in [stored for stored, buffer in self._buffers.items() if buffer is None]:
            self._buffers[stored] = self._buffers.pop(
                stored
            )  # last: torch.export 2.13 miscounts empty ones before others

    def _unpack(self) -> None:
        """Hold the operator's tensors again."""
        if not self._repacked:
            return
        portable = self._portable()
        for name, stored in self._stored.items():
            if getattr(self, stored) is None:
                self.register_buffer(stored, portable[name])
            else:
                relayout(getattr(self, stored), portable[name])
        for name in self._packed:
            delattr(self, packed_name(name))
        self._packed, self._repacked = (), False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLinear:
        """Move the tensors but keep their dtype; the dtype asked for is the one expected of ``x``."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._unpack()
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        for stored, tie in self._ties.items():
            self._buffers[stored] = tie.follow(getattr(self, stored))
        self._expect(fn(torch.empty(0, dtype=self._dtype)).dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The operator's tensors and the bias, whatever layout is held."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._repacked and not keep_vars:
            portable = self._portable()
            destination.update({prefix + stored: portable[name].detach() for name, stored in self._stored.items()})
        elif self._repacked:
            portable = self._portable()
            missing = {name: stored for name, stored in self._stored.items() if getattr(self, stored) is None}
            destination.update({prefix + stored: portable[name] for name, stored in missing.items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Load, and bind again if the layout is the kernel's or tensors were assigned from another device."""
        repacked = self._repacked
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if repacked or self._device() != self._bound_device:
            self._bind()


def _outline(expression: Expression) -> str:
    """``sum(quantized, low_rank)``."""
    if isinstance(expression, (Sum, Product)):
        return f"{expression.kind}({', '.join(_outline(term) for term in expression.terms)})"
    return expression.kind


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
