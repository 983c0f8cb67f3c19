"""Safetensors shards with a checksum for every tensor and every header, so that no changed byte passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tnc.errors import CheckpointError

SHARD_BYTES = 2 * 10**9


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], *, limit: int = SHARD_BYTES
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write ``tensors`` in their order to shards of at most ``limit`` bytes (one tensor may exceed it).

    Returns:
        Records of the files (``bytes``, ``header_sha256``) and of the tensors (``file``, ``dtype``, ``shape``,
        ``sha256`` of the raw bytes), by name.

    Memory: a CPU copy of one shard.
    """
    groups = _groups(tensors, limit)
    files: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for i, names in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        shard = {n: tensors[n].detach().cpu().clone(memory_format=torch.contiguous_format) for n in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only the owner reads
        files[file] = {
            "bytes": (folder / file).stat().st_size,
            "header_sha256": _header_digest(folder / file),
        }
        for name, tensor in shard.items():
            records[name] = {
                "file": file, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
                "sha256": _digest(tensor),
            }  # fmt: skip
    return files, records


def read_shards(
    folder: Path, names: Iterable[str], files: Mapping[str, Any], records: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The named tensors on the CPU, each checked against its record; files that hold none are not opened.

    Raises:
        CheckpointError: if a file is missing, cut short or changed, or a tensor is missing or changed; names
            the file and the layers in it.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        if name not in records:
            raise CheckpointError(
                f"checkpoint {folder} lists no tensor {name!r}, which layer {_layer(name)} needs; tnc.json is not "
                "that of this folder. Copy the whole checkpoint again."
            )
        by_file.setdefault(records[name]["file"], []).append(name)
    found: dict[str, Tensor] = {}
    for file, wanted in by_file.items():
        layers = _layers_of(file, records)
        _check_file(folder, file, files, layers)
        found.update(_read(folder / file, wanted, records, layers))
    return found


def _groups(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _check_file(folder: Path, file: str, files: Mapping[str, Any], layers: str) -> None:
    path, record = folder / file, files.get(file)
    if record is None or Path(file).name != file:
        raise CheckpointError(f"tnc.json names the shard {file!r} but does not describe it; copy the checkpoint again.")
    if not path.is_file():
        raise CheckpointError(f"shard {path} with {layers} is missing; copy the whole checkpoint again.")
    size = path.stat().st_size
    if size != record["bytes"]:
        what = "truncated" if size < record["bytes"] else "too long"
        raise CheckpointError(
            f"shard {path} is {what}: {size} bytes, expected {record['bytes']}; it holds {layers}. Copy it again."
        )
    if _header_digest(path) != record["header_sha256"]:
        raise CheckpointError(f"the header of shard {path} was changed (sha256); it holds {layers}. Copy it again.")


def _read(path: Path, names: list[str], records: Mapping[str, Any], layers: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as shard:
            missing = sorted(set(names) - set(shard.keys()))
            if missing:
                raise CheckpointError(
                    f"shard {path} lacks tensor {missing[0]!r} of layer {_layer(missing[0])}; copy it again."
                )
            for name in names:
                found[name] = shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {path} with {layers} cannot be read: {error}. Copy it again.") from error
    for name, tensor in found.items():
        if _digest(tensor) != records[name]["sha256"]:
            raise CheckpointError(
                f"tensor {name!r} of layer {_layer(name)} in shard {path} was changed: its bytes do not have the "
                "recorded sha256. Copy the file again; do not use it as it is."
            )
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _header_digest(path: Path) -> str:
    """Sha256 of the header's length (8 bytes, little-endian) and the header; everything else is tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        size = min(int.from_bytes(length, "little"), path.stat().st_size)
        return hashlib.sha256(length + file.read(size)).hexdigest()


def _layer(name: str) -> str:
    return repr(name.rpartition(".")[0] or name)


def _layers_of(file: str, records: Mapping[str, Any]) -> str:
    """``layers 'a', 'b', 'c' and 4 more``: what a reader loses with the file."""
    layers = list(dict.fromkeys(_layer(name) for name, record in records.items() if record["file"] == file))
    rest = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return f"layers {', '.join(layers[:3])}{rest}"
