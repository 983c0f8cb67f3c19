"""``tnc.json``: what a checkpoint holds.

Keys of version 1: ``format_version``, ``tnc_version``, ``base``, ``recipe``, ``dtype`` (of the uncompressed
parameters), ``layers`` (name to ``shape``, ``bias``, ``spec`` (of the expression), ``tensors`` (name in the
expression to key in the state dict), ``report``), ``tied`` (key to the key it shares), ``files``, ``tensors``; and
``siblings`` (names of the layers of every group with one input), which may be missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tnc.checkpoint.folder import MANIFEST
from tnc.errors import CheckpointError

FORMAT_VERSION = 1
_KEYS = frozenset({"layers", "tied", "files", "tensors", "dtype"})


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; no tensor is read.

    Raises:
        CheckpointError: if the folder or ``tnc.json`` is missing (a dense model is told apart), or it is not
            JSON, lacks keys, or is of a newer version.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist; expected a folder with {MANIFEST}.")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(_not_a_checkpoint(folder))
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON ({error}); copy the checkpoint again.") from error
    _check_version(folder, manifest)
    missing = sorted(_KEYS - manifest.keys())
    if missing:
        raise CheckpointError(f"{folder / MANIFEST} lacks {', '.join(missing)}; copy the checkpoint again.")
    return dict(manifest)


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """Write ``tnc.json``.

    Raises:
        CheckpointError: if a field is not JSON: an object of another type, NaN or Inf.
    """
    try:
        text = json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"recipe or reports cannot be written to {MANIFEST}: {error}. Pass numbers, strings, lists and dicts; "
            "LayerReport.to_json() gives them."
        ) from error
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _not_a_checkpoint(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return (
            f"folder {folder} is a dense model without {MANIFEST}; expected a tnc checkpoint. Make one with: "
            f"tnc compress {folder} --recipe eora --bits 4 --rank 16 --calib TEXT --out DIR."
        )
    return f"folder {folder} has no {MANIFEST}; expected a tnc checkpoint, written by tnc.save_checkpoint."


def _check_version(folder: Path, manifest: object) -> None:
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{folder / MANIFEST} has format_version {version!r}; expected an integer from 1 to {FORMAT_VERSION}. "
            "Copy the checkpoint again."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has format_version {version}; this tnc knows versions up to {FORMAT_VERSION}. "
            "Upgrade tnc to read it."
        )
