"""Hidden states between blocks: in memory up to a limit, beyond it in temporary files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Union

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tnc.errors import StatsError

Key = tuple[str, int, int]  # kind, block, batch
_Place = Union[Tensor, tuple[Path, torch.device]]  # noqa: UP007 (evaluated at run time)


class HiddenStates:
    """Tensors by (kind, block, batch), each put once and taken once.

    Tensors past ``memory_limit_bytes`` go to safetensors files in a temporary directory, removed on exit,
    and come back bit for bit on the device they came from. Use it as a context manager.
    """

    def __init__(self, memory_limit_bytes: int) -> None:
        if memory_limit_bytes < 0:
            raise StatsError(
                f"memory_limit_bytes={memory_limit_bytes} is negative; expected the bytes of hidden states "
                "to keep in memory, 0 to keep all of them in temporary files."
            )
        self._limit = memory_limit_bytes
        self._held = 0
        self._places: dict[Key, _Place] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.clear()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def spilled(self) -> int:
        """Number of tensors in files now."""
        return sum(not isinstance(place, Tensor) for place in self._places.values())

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep ``tensor``, detached."""
        assert key not in self._places
        size = tensor.numel() * tensor.element_size()
        if self._held + size <= self._limit:
            self._held += size
            self._places[key] = tensor.detach()
        else:
            self._places[key] = self._write(key, tensor.detach())

    def take(self, key: Key) -> Tensor:
        """Give ``tensor`` back and forget it."""
        place = self._places.pop(key)
        if isinstance(place, Tensor):
            self._held -= place.numel() * place.element_size()
            return place
        path, device = place
        tensor = load_file(path, device=str(device))["hidden"]
        path.unlink()
        return tensor

    def _write(self, key: Key, tensor: Tensor) -> tuple[Path, torch.device]:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="tnc-hidden-")
        path = Path(self._folder.name) / f"{key[0]}-{key[1]}-{key[2]}.safetensors"
        save_file({"hidden": tensor.contiguous()}, path)
        return path, tensor.device
