"""Finished layers of a run, kept until the whole model is written: a killed run goes on where it stopped.

A record is found by the digest of everything its layer was made from, so another model, text, recipe or seed never
finds it and a repeated run always does. Records are written to a temporary name and renamed: a killed run leaves
whole records only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tnc.errors import CheckpointError
from tnc.terms import Expression, from_spec


@dataclass(frozen=True, eq=False)
class Record:
    """One finished layer: its operator and the JSON-able report of what it cost."""

    operator: Expression
    report: dict[str, Any]


class Journal:
    """Finished layers in a folder, which is made with the first of them.

    Args:
        folder: of this run alone; `clear` removes it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __len__(self) -> int:
        """Number of finished layers."""
        return sum(1 for _ in self.folder.glob("*.safetensors"))

    def find(self, key: str) -> Record | None:
        """The layer recorded under ``key``, on the CPU, or ``None``.

        Raises:
            CheckpointError: if its file cannot be read or was changed.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            spec, report = json.loads(notes["spec"]), json.loads(notes["report"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"record {path} cannot be read: {error}. {self._advice()}") from error
        if notes["sha256"] != _content_digest(spec, report, tensors):
            raise CheckpointError(f"record {path} was changed: its content has another sha256. {self._advice()}")
        return Record(from_spec(spec, tensors), report)

    def add(self, key: str, operator: Expression, report: Mapping[str, Any]) -> None:
        """Record a finished layer; it is on disk when this returns.

        Raises:
            CheckpointError: if it cannot be written.
        """
        tensors = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format)
                   for k, t in operator.tensors().items()}  # fmt: skip
        spec, noted = operator.spec(), json.loads(json.dumps(dict(report)))
        notes = {"spec": json.dumps(spec), "report": json.dumps(noted)}
        notes["sha256"] = _content_digest(json.loads(notes["spec"]), noted, tensors)
        path = self._path(key)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=notes)
            _flush(partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise CheckpointError(
                f"finished layer could not be recorded in {self.folder}: {error}. Free space or choose another disk; "
                "the layers recorded before are kept."
            ) from error

    def clear(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _advice(self) -> str:
        return f"Remove the file to compute this layer again, or {self.folder} to start over."


def digest(parts: Iterable[Tensor | str | None]) -> str:
    """Sha256 of tensors (dtype, shape, bytes), strings and absences, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            whole = part.detach().cpu().contiguous()
            total.update(f"tensor {whole.dtype} {tuple(whole.shape)} ".encode())
            total.update(whole.reshape(-1).view(torch.uint8).numpy().data)
        else:
            total.update(repr(part).encode() + b" ")
    return total.hexdigest()


def _content_digest(spec: Any, report: Any, tensors: Mapping[str, Tensor]) -> str:  # noqa: ANN401
    named = (part for name in sorted(tensors) for part in (name, tensors[name]))
    return digest([json.dumps(spec, sort_keys=True), json.dumps(report, sort_keys=True), *named])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
