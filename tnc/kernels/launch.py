"""What every Triton launch needs to know: the device, zeroed counters, sizes of tiles."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from tnc.errors import BackendError

P = ParamSpec("P")
T = TypeVar("T")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ARENA = 1 << 21  # counters set aside a device for captured graphs: 8 MB


def tile_of(size: int, *, least: int = 16, most: int = 1 << 20) -> int:
    """Smallest power of two that holds ``size``, between ``least`` and ``most``."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=64)
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends (programmatic dependent launch, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def early(pdl: bool) -> dict[str, bool]:
    """Options of a launch that may begin early, if ``pdl`` (`overlaps`); its kernel waits by ``grid_wait``."""
    return {"launch_pdl": True} if pdl else {}


class Counters:
    """Zeroed int32 counters of one device; every kernel leaves them at zero.

    Kernels that run one after another on a stream share counters. A launch that is captured into a graph gets
    its own for good, because graphs may be replayed side by side: out of an arena, for a capture cannot allocate any
    that stay zero. Launches between captures take another arena where the last is half used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, Tensor] = {}
        self._arenas = [self._new_arena()] if device.type == "cuda" else []  # graphs hold places in all of them
        self._used = 0  # of the last

    def take(self, count: int) -> Tensor:
        """``count`` counters for one launch on the current stream.

        Raises:
            BackendError: if captured launches use up an arena with no other launch between them.
        """
        if self._device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32)
        if torch.cuda.is_current_stream_capturing():
            return self._from_arena(count)
        if self._used > _ARENA // 2:
            self._arenas.append(self._new_arena())
            self._used = 0
        stream = torch.cuda.current_stream(self._device).cuda_stream
        held = self._streams.get(stream)
        if held is None or held.numel() < count:
            held = self._streams[stream] = torch.zeros(max(count, 4096), dtype=torch.int32, device=self._device)
        return held

    def _from_arena(self, count: int) -> Tensor:
        start, self._used = self._used, self._used + 32 * math.ceil(count / 32)
        if self._used > _ARENA:
            raise BackendError(
                f"CUDA graphs captured on {self._device} took all {_ARENA} counters that fused kernels set aside; run "
                "the model once outside of a capture before the next one, as CUDA graphs want it anyway, or capture "
                "fewer launches in one graph."
            )
        return self._arenas[-1][start : start + count]

    def _new_arena(self) -> Tensor:
        return torch.zeros(_ARENA, dtype=torch.int32, device=self._device)


@lru_cache(maxsize=64)
def counters(device: torch.device) -> Counters:
    """The counters of a device; made on first use, which must not be inside a graph capture."""
    return Counters(device)


class _Placed(Protocol):
    @property
    def device(self) -> torch.device:
        """Where it lies."""


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """A launch with the device of its first argument as the current one, where Triton launches."""

    @wraps(launch)
    def placed(*args: P.args, **kwargs: P.kwargs) -> T:
        first: _Placed = args[0]  # type: ignore[assignment]
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return placed


@lru_cache(maxsize=1)
def _driver() -> Any:  # noqa: ANN401
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None


def capture_of(stream: int) -> int | None:
    """Number of the graph capture that a CUDA stream is in, a new one for each; ``None`` if it cannot be told."""
    ask = _driver()
    status, number = ctypes.c_int(), ctypes.c_uint64()
    if ask is None or ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None) != 0:
        return None
    return number.value if status.value == 1 else None


def unsuited(device: torch.device) -> str | None:
    """Why the launches of this package cannot run on a device, or ``None``; then its counters exist."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs a GPU of compute capability 8.0 or later"
    counters(device)  # made here, outside of any graph capture
    return None
