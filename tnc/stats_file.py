"""Calibration statistics on disk: one safetensors file, exact and without pickle.

Each distinct `Moments` object is stored once, under ``moments.I.second``, ``moments.I.mean_abs`` and, where there
is one, ``moments.I.cross``; the header's metadata says which layer uses which.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tnc.errors import StatsError
from tnc.stats import LayerStats, Moments

FORMAT_VERSION = 1
_KEYS = ("tnc_format", "tnc_version", "layers", "tokens")
_PARTS = ("inputs", "heldout", "gradient")


def save_stats(
    stats: Mapping[str, LayerStats], path: str | os.PathLike[str], *, extra: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write statistics of several layers to one safetensors file, under its final name only once complete.

    Args:
        stats: by layer name, in any order, which is kept. Shared `Moments` are stored once.
        path: of the file; its folder exists.
        extra: text to keep beside them in the metadata, such as the model's name; read it with
        `stats_metadata`.
        overwrite: replace an existing file.

    Raises:
        StatsError: if the file exists, its folder does not, it cannot be written, or ``extra`` uses a
        reserved key.

    Cost: the bytes of all distinct moments, in the dtype they have.
    """
    target = Path(path)
    _check_target(target, overwrite)
    metadata = dict(extra or {})
    reserved = [key for key in _KEYS if key in metadata]
    if reserved:
        raise StatsError(f"extra uses the reserved keys {reserved}; expected other names than {list(_KEYS)}.")
    tensors, entries = _pack(stats)
    _replace(target, tensors, {**metadata, **entries})


def load_stats(path: str | os.PathLike[str]) -> dict[str, LayerStats]:
    """Statistics from `save_stats`: bit for bit, on the CPU, shared moments shared again.

    Raises:
        StatsError: if the file is missing, truncated, corrupt, a pickle, of a newer version or of another
            kind; it names the file.
    """
    source = Path(path)
    metadata, tensors = _read(source, with_tensors=True)
    try:
        tokens: list[int] = json.loads(metadata["tokens"])
        moments = [_moments(tensors, number, count) for number, count in enumerate(tokens)]
        layers: list[dict[str, Any]] = json.loads(metadata["layers"])
        return {row["name"]: _layer(moments, row) for row in layers}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StatsError(f"{source} is damaged: {error!r} while reading its layers; calibrate again.") from error


def stats_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The ``extra`` of `save_stats`; reads the header only. Errors as `load_stats`."""
    metadata, _ = _read(Path(path), with_tensors=False)
    return {key: value for key, value in metadata.items() if key not in _KEYS}


def _moments(tensors: Mapping[str, Tensor], number: int, tokens: int) -> Moments:
    second, mean_abs = tensors[f"moments.{number}.second"], tensors.get(f"moments.{number}.mean_abs")
    if second.ndim != 2 or second.shape[0] != second.shape[1]:
        raise ValueError(f"moments.{number}.second has shape {tuple(second.shape)}, not (n, n)")
    if mean_abs is not None and mean_abs.shape != second.shape[:1]:
        raise ValueError(f"moments.{number}.mean_abs has shape {tuple(mean_abs.shape)}, not {tuple(second.shape[:1])}")
    cross = tensors.get(f"moments.{number}.cross")
    if cross is not None and cross.shape != second.shape:
        raise ValueError(f"moments.{number}.cross has shape {tuple(cross.shape)}, not {tuple(second.shape)}")
    return Moments(second, mean_abs, int(tokens), cross)


def _layer(moments: list[Moments], row: Mapping[str, Any]) -> LayerStats:
    inputs, heldout, gradient = (_at(moments, row[part]) for part in _PARTS)
    return LayerStats(inputs, heldout, gradient, tuple(map(str, row.get("notes", ()))))  # type: ignore[arg-type]


def _at(moments: list[Moments], place: int | None) -> Moments | None:
    if place is not None and place < 0:
        raise IndexError(f"moments number {place}")
    return None if place is None else moments[place]


def _pack(stats: Mapping[str, LayerStats]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by key, and the metadata that puts them together again."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}
    tokens: list[int] = []
    rows: list[dict[str, Any]] = []
    for name, layer in stats.items():
        row: dict[str, Any] = {"name": name, **({"notes": layer.notes} if layer.notes else {})}
        for part in _PARTS:
            moments: Moments | None = getattr(layer, part)
            row[part] = None
            if moments is not None:
                number = row[part] = numbers.setdefault(id(moments), len(numbers))
                if number == len(tokens):
                    tokens.append(moments.tokens)
                    tensors |= _tensors(moments, number)
        rows.append(row)
    version = {"tnc_format": "layer statistics", "tnc_version": str(FORMAT_VERSION)}
    return tensors, {**version, "layers": json.dumps(rows), "tokens": json.dumps(tokens)}


def _tensors(moments: Moments, number: int) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, which different Moments of one caller may
    found = {f"moments.{number}.second": moments.second.detach().clone().contiguous()}
    if moments.mean_abs is not None:
        found[f"moments.{number}.mean_abs"] = moments.mean_abs.detach().clone().contiguous()
    if moments.cross is not None:
        found[f"moments.{number}.cross"] = moments.cross.detach().clone().contiguous()
    return found


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise StatsError(f"{target} is a folder; expected the name of a file to write statistics to.")
    if target.exists() and not overwrite:
        raise StatsError(f"{target} exists; expected a new file. Choose another name, or pass overwrite=True.")
    if not target.parent.is_dir():
        raise StatsError(f"the folder {target.parent} does not exist; create it before saving statistics there.")


def _replace(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, name, metadata=metadata)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the user's group
        os.replace(name, target)
    except (OSError, SafetensorError) as error:
        raise StatsError(
            f"{target} could not be written ({error}); nothing was left under that name that was not there "
            "before. Free space, or choose another folder."
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(source: Path, *, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not source.is_file():
        raise StatsError(f"{source} is not a file; expected statistics written by save_stats.")
    with source.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK" or re.match(rb"\x80[\x02-\x05]", start):
        raise StatsError(
            f"{source} is a pickle (or a torch.save archive), which could run code when read; refused. "
            "Expected a safetensors file from save_stats; calibrate again."
        )
    try:
        with safe_open(source, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check_version(source, metadata)
            keys = list(file.keys()) if with_tensors else []
            return metadata, {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise StatsError(
            f"{source} is truncated or corrupt ({error}); expected a complete safetensors file from "
            "save_stats. Copy it again, or calibrate again."
        ) from error


def _check_version(source: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get("tnc_version", "")
    if metadata.get("tnc_format") != "layer statistics" or not version.isdecimal():
        raise StatsError(f"{source} is a safetensors file without layer statistics; expected one from save_stats.")
    if int(version) > FORMAT_VERSION:
        raise StatsError(
            f"{source} has format version {version}; this tnc reads up to {FORMAT_VERSION}. Update tnc, or "
            "calibrate again."
        )
