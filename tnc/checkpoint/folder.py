"""An output folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tnc.errors import CheckpointError

MANIFEST = "tnc.json"


def check_output_folder(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise unless a checkpoint may be written to ``path``; call it before long work.

    Raises:
        CheckpointError: if ``path`` exists, and with ``overwrite`` if it is anything but a tnc checkpoint.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointError(
            f"output folder {path} exists; expected a new one. Choose another name, remove it, or replace it with "
            "overwrite=True (--overwrite of tnc compress)."
        )
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"output {path} exists and is not a tnc checkpoint (it has no {MANIFEST}), so overwriting "
            "does not replace it; choose another name or remove it yourself."
        )


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool, needed: int) -> Iterator[Path]:
    """A folder to fill that is renamed to ``path`` when the block ends well, and removed when it does not.

    The folder is a hidden sibling of ``path`` (same file system); files are flushed to disk before the rename.
    An existing checkpoint is replaced only once the new one is complete.

    Args:
        path: final name; missing parents are created.
        overwrite: replace an existing tnc checkpoint.
        needed: bytes that will be written.

    Raises:
        CheckpointError: see `check_output_folder`; if the disk has fewer than ``needed`` bytes free, or writing
            fails: says both numbers.
    """
    check_output_folder(path, overwrite=overwrite)
    final = Path(path).resolve()
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_space(final, needed)
        partial.mkdir()
        yield partial
        _flush(partial)
        _replace(partial, final, overwrite=overwrite)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path} could not be written: {error}. {needed} bytes are needed, {_free(final)} are free; "
            "nothing was left under that name. Free space or choose another disk."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(final: Path, needed: int) -> None:
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise CheckpointError(
            f"checkpoint {final} needs {needed} bytes and only {free} are free; nothing was written. Free space or "
            "choose another disk."
        )


def _free(final: Path) -> str:
    try:
        return str(shutil.disk_usage(final.parent).free)
    except OSError:
        return "an unknown number"


def _flush(folder: Path) -> None:
    """Force every file, then the folder itself, to disk."""
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, final: Path, *, overwrite: bool) -> None:
    """Rename ``partial`` to ``final``; an old folder steps aside first and comes back if that fails."""
    if not (overwrite and final.exists()):
        check_output_folder(final)  # someone else may have made it meanwhile
        partial.rename(final)
        return
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old")
    final.rename(aside)
    try:
        partial.rename(final)
    except BaseException:
        with suppress(OSError):
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
