"""Moments of the layers of one block, gathered by hooks while the block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

from torch import Tensor, nn

from tnc.errors import ModelError, NonFiniteError, all_finite
from tnc.models.layers import weight_of
from tnc.stats import Moments, MomentsAccumulator

Slot = tuple[str, int]  # a distinct input: the first layer it reached, and at which of the layer's calls


class InputCapture:
    """Second moments of layer inputs, one accumulator for each distinct input tensor of a forward pass.

    Layers that are passed one tensor (q, k and v; gate and up) get the same `Moments` object. A layer that
    runs several times in a pass gets the moments of all its inputs.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._sums: dict[Slot, MomentsAccumulator] = {}
        self._slots: dict[str, tuple[Slot, ...]] = {}

    @contextmanager
    def watching(self, dense: Mapping[Slot, Tensor] | None = None) -> Iterator[None]:
        """Add the inputs of one forward pass of the block, run inside.

        Args:
            dense: inputs of the same tokens in the uncompressed model, from `recorded_inputs`: cross moments are
                gathered too.

        Raises:
            NonFiniteError: if an input holds NaN or Inf; names the layer.
            ModelError: if layers share an input in one pass and not in another.
        """
        with _watched(self._layers, lambda slot, x: self._add(slot, x, (dense or {}).get(slot))) as used:
            yield
        for name, slots in used.items():
            self._check_slots(name, tuple(slots))

    def moments(self) -> dict[str, Moments]:
        """Moments of every layer that ran, one object for one set of inputs."""
        means = {slot: sums.moments() for slot, sums in self._sums.items()}
        merged = {slots: reduce(Moments.merge, [means[slot] for slot in slots]) for slots in self._slots.values()}
        return {name: merged[slots] for name, slots in self._slots.items()}

    def _add(self, slot: Slot, x: Tensor, dense: Tensor | None) -> None:
        _check_activations(x, slot[0], "input")
        rows = x.detach().reshape(-1, x.shape[-1])  # (tokens, n)
        if slot not in self._sums:
            self._sums[slot] = MomentsAccumulator(rows.shape[1], rows.device)
        self._sums[slot].add(rows, None if dense is None else dense.reshape(-1, dense.shape[-1]))

    def _check_slots(self, name: str, slots: tuple[Slot, ...]) -> None:
        if self._slots.setdefault(name, slots) != slots:
            raise ModelError(
                f"layer {name!r} shares its input with {_leaders(self._slots[name])} in one batch and with "
                f"{_leaders(slots)} in another; expected the same wiring for every batch. Exclude this layer."
            )


@contextmanager
def recorded_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[Slot, Tensor]]:
    """Copies of the distinct inputs of one forward pass of the block, run inside, by the slots of `InputCapture`."""
    found: dict[Slot, Tensor] = {}
    with _watched(layers, lambda slot, x: found.update({slot: x.detach().clone()})):
        yield found


@contextmanager
def _watched(layers: Mapping[str, nn.Module], visit: Callable[[Slot, Tensor], None]) -> Iterator[dict[str, list[Slot]]]:
    """Visit every distinct input of one forward pass, once; gives the slots of every layer's calls."""
    # The tensors are kept until the pass ends, so that no address is used twice.
    seen: dict[tuple[object, ...], tuple[Slot, Tensor]] = {}
    used: dict[str, list[Slot]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version)
            slots = used.setdefault(name, [])
            if key not in seen:
                seen[key] = (name, len(slots)), x
                visit(seen[key][0], x)
            slots.append(seen[key][0])

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True).remove)
        yield used


class GradientCapture:
    """Second moments of the gradients that arrive at the outputs of layers, one accumulator a layer."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._sums = {
            name: MomentsAccumulator(weight_of(layer).shape[0], weight_of(layer).device)
            for name, layer in layers.items()
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add the gradients of one forward and backward pass of the block, both run inside.

        Raises:
            NonFiniteError: if a gradient holds NaN or Inf; names the layer.
        """

        def hook_of(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                if output.requires_grad:
                    output.register_hook(lambda gradient: self._add(name, gradient))  # type: ignore[no-untyped-call]
                    return output
                leaf = output.detach().requires_grad_()  # nothing before this layer asks for a gradient
                leaf.register_hook(lambda gradient: self._add(name, gradient))  # type: ignore[no-untyped-call]
                return leaf.clone()

            return hook

        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(hook_of(name)).remove)
            yield

    def moments(self) -> dict[str, Moments]:
        """Moments of every layer."""
        return {name: sums.moments() for name, sums in self._sums.items()}

    def _add(self, name: str, gradient: Tensor) -> None:
        _check_activations(gradient, name, "output gradient")
        self._sums[name].add(gradient.reshape(-1, gradient.shape[-1]))


def _check_activations(tensor: Tensor, name: str, what: str) -> None:
    if not all_finite(tensor):
        raise NonFiniteError(
            f"the {what} of layer {name!r} holds NaN or Inf during calibration; expected finite numbers. "
            f"Look for NaN in earlier weights; if there is none, load the model in float32 or bfloat16 (it "
            f"runs in {tensor.dtype})."
        )


def _leaders(slots: tuple[Slot, ...]) -> str:
    return ", ".join(repr(name) for name, _ in slots)
