"""`Siblings`: layers that a model calls one by one with one input, and what they compute once for all.

Model code keeps calling ``q_proj(x)``, ``k_proj(x)``, ``v_proj(x)``. The first call with an x computes what is common
(`tnc.kernels.together`): a rotation, R x of a shared right factor, or every answer in one launch; the others take it.

A result is handed over only if all of this holds, else the layer computes afresh:

1. the call has the same tensor *object*, alive since, with the same version, memory, shape and strides;
2. the layer's own tensors are the objects, versions and memory they were;
3. it is the same thread, CUDA stream, graph capture and autocast state;
4. each layer takes once.

A thread keeps what one group computed for one x, until the last layer took it, another group computes, or x is gone.
Layers run apart where gradients are enabled, in inference mode (torch counts no versions there), while tracing or
compiling, for tensor subclasses, and in a capture before anything ran outside of one. Edits that torch does not count,
through ``x.data`` or a foreign kernel, between the calls of one group are not seen: `Siblings.active` switches it off.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tnc.kernels.launch import capture_of
from tnc.kernels.table import Bound, Tensors
from tnc.kernels.together import Started, Together, together
from tnc.terms import Expression

PATIENCE = 8  # launches in a row whose answers were not all asked for, after which a group runs apart
Stamp = tuple[tuple[int, int, int], ...]  # (object, version, memory) of each tensor


class Layer(Protocol):
    """What a group asks of its layers."""

    @property
    def operator(self) -> Expression:
        """The expression."""

    def bound(self) -> tuple[Bound, dict[str, Tensor]]:
        """The kernel, and the very tensors it is called with."""

    def expects(self) -> torch.dtype:
        """Dtype expected of x."""


class Siblings:
    """A group of layers with one input. Layers hold it; it holds them weakly, and no tensor.

    A copy of all layers is a group of its own; a copy of some, or a layer without the others, runs apart.

    Args:
        names: of the layers, for people.

    Attributes:
        active: whether anything is shared; set it to ``False`` to let the layers run apart.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.active = True
        self._layers: list[weakref.ref[Layer] | None] = [None] * len(self.names)
        self._plan: _Plan | None = None
        self._missed = 0

    def join(self, place: int, layer: Layer) -> None:
        """Take a layer in, unless its place is taken."""
        taken = self._layers[place]
        if taken is None or taken() is None:
            self._layers[place] = weakref.ref(layer)
            self.changed()

    def changed(self) -> None:
        """A layer has another kernel or other tensors: plan again."""
        self._plan = None

    def answer(self, place: int, layer: Layer, x: Tensor) -> Tensor | None:
        """What the layer at ``place`` gives for x, without bias; ``None`` where it has to run by itself."""
        if not self.active or torch.is_grad_enabled() or type(x) is not Tensor or _traced():
            return None
        if self._plan is not None and self._plan.how is None:  # nothing in common
            return None
        key = _key(x)
        if key is None:
            return None
        mine = layer.bound()[1]
        shared = _THREAD.shared
        if shared is None or not shared.serves(self, place, x, key, mine):
            shared = self._start(place, layer, x, key)
        return None if shared is None else shared.take(place, x, mine)

    def describe(self) -> str:
        """What the group does, for people."""
        layers = self._present()
        plan = None if layers is None else self._planned(layers)
        if not self.active:
            what = "switched off, or not all were asked for: they run apart"
        elif plan is None or plan.how is None:
            what = "nothing in common: they run apart"
        else:
            what = plan.how.describe()
        return f"one input for {', '.join(self.names)}: {what}"

    def missed(self) -> None:
        """Answers of a launch were not asked for."""
        self._missed += 1
        if self._missed >= PATIENCE:
            self.active = False

    def met(self) -> None:
        """All answers were asked for."""
        self._missed = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings:
        """A group for the copies of the layers, which join it."""
        return self._empty()

    def __reduce__(self) -> tuple[Any, ...]:
        """As `__deepcopy__`."""
        return _restored, (self.names, self.active)

    def _empty(self) -> Siblings:
        return _restored(self.names, self.active)

    def _present(self) -> list[Layer] | None:
        """The layers, if all are there."""
        found = [None if layer is None else layer() for layer in self._layers]
        layers = [layer for layer in found if layer is not None]
        return layers if len(layers) == len(found) else None

    def _planned(self, layers: Sequence[Layer]) -> _Plan:
        plan = self._plan
        if plan is None:
            plan = self._plan = _Plan.of(layers)
        return plan

    def _start(self, place: int, layer: Layer, x: Tensor, key: _Key) -> _Shared | None:
        """Compute what is common."""
        layers = self._present()
        capturing = key[-1] != 0
        if layers is None or layers[place] is not layer or (capturing and self._plan is None):
            return None
        plan = self._planned(layers)
        if plan.how is None:
            return None
        tensors = [each.bound()[1] for each in layers]
        stamps = [_stamp(each) for each in tensors]
        if any(stamp is None for stamp in stamps):
            return None
        if plan.front != _front(plan.how, tensors):  # somebody edited a rotation: are they still the same?
            self.changed()
            return None if capturing else self._start(place, layer, x, key)
        started = plan.how.start(x, tensors, place)
        before = _THREAD.shared
        if before is not None:
            before.drop()
        shared = _Shared(self, plan.how, started, key, [stamp for stamp in stamps if stamp is not None])
        shared.watch(x)
        _THREAD.shared = shared
        return shared


def _restored(names: tuple[str, ...], active: bool) -> Siblings:
    group = Siblings(names)
    group.active = active
    return group


@dataclass(frozen=True)
class _Plan:
    """How the layers of a group run, and the stamps of the tensors that were compared for it."""

    how: Together | None
    front: list[Stamp | None]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> _Plan:
        held = [layer.bound() for layer in layers]
        devices = {tensor.device for _, tensors in held for tensor in tensors.values()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            return cls(None, [])
        kernels, tensors = [kernel for kernel, _ in held], [each for _, each in held]
        how = together(kernels, tensors, lambda i: layers[i].operator, next(iter(devices)), layers[0].expects())
        return cls(how, [] if how is None else _front(how, tensors))


def _front(how: Together, tensors: Sequence[Tensors]) -> list[Stamp | None]:
    """Stamps of the tensors of the common transforms."""
    return [
        _stamp(part.own(each))
        for chain, each in zip(how.chains, tensors, strict=True)
        for part in chain[: how.common]
    ]  # fmt: skip


class _Shared:
    """What one group computed for one x, in one thread."""

    def __init__(self, group: Siblings, how: Together, started: Started, key: _Key, stamps: Sequence[Stamp]) -> None:
        self._group, self._how, self._key, self._stamps = group, how, key, stamps
        self._started: Started | None = started
        self._left = set(range(len(stamps)))
        self._x: weakref.ref[Tensor] | None = None

    def watch(self, x: Tensor) -> None:
        """Drop everything when x is gone."""
        mine = weakref.ref(self)

        def gone(_: object) -> None:
            shared = mine()
            if shared is not None:
                shared.drop()

        self._x = weakref.ref(x, gone)

    def serves(self, group: Siblings, place: int, x: Tensor, key: _Key, mine: Tensors) -> bool:
        """Whether this is what the layer would compute."""
        return (
            self._started is not None
            and self._group is group
            and place in self._left
            and self._x is not None
            and self._x() is x
            and self._key == key
            and self._stamps[place] == _stamp(mine)
        )

    def take(self, place: int, x: Tensor, mine: Tensors) -> Tensor:
        """The answer of a layer to x."""
        assert self._started is not None, "it serves"
        y = self._how.finish(self._started, x, place, mine)
        self._left.discard(place)
        if not self._left:
            self._group.met()
            self._started = None
            _THREAD.shared = None
        return y

    def drop(self) -> None:
        """Forget what was not taken."""
        if self._started is not None and self._started.outputs is not None:
            self._group.missed()
        self._started = None


class _Thread(threading.local):
    shared: _Shared | None = None


_THREAD = _Thread()
_Key = tuple[Any, ...]


def _key(x: Tensor) -> _Key | None:
    """What must not change between calls, the number of the graph capture last; ``None`` where it cannot be told."""
    kind = x.device.type
    if kind not in ("cpu", "cuda"):
        return None
    stream = capture = 0
    if kind == "cuda":
        stream = torch.cuda.current_stream(x.device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            found = capture_of(stream)
            if found is None:
                return None
            capture = found
    try:
        version, memory = x._version, x.data_ptr()
    except RuntimeError:  # an inference tensor, or one without memory of its own
        return None
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return version, memory, x.shape, x.stride(), x.dtype, cast, stream, capture


def _stamp(tensors: Tensors) -> Stamp | None:
    """Objects, versions and memory of tensors; ``None`` for those without."""
    try:
        return tuple((id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors.values())
    except RuntimeError:
        return None


def _traced() -> bool:
    return torch._C._get_tracing_state() is not None or _get_current_dispatch_mode() is not None
