"""Writing a compressed model to a folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tnc.checkpoint.folder import new_folder
from tnc.checkpoint.manifest import write_manifest
from tnc.checkpoint.shards import write_shards
from tnc.embedding import FactoredEmbedding
from tnc.errors import CheckpointError
from tnc.modules import FactoredLinear
from tnc.siblings import sibling_groups

# Room for headers, tnc.json, config and tokenizer files in the check of free space.
_EXTRA_BYTES = 1 << 20


class Saves(Protocol):
    """A tokenizer that writes itself to a folder, as those of Hugging Face do."""

    def save_pretrained(self, save_directory: str) -> Any:  # noqa: ANN401
        """Write the files."""


def save_checkpoint(
    model: nn.Module, path: str | Path, *, base: str | None = None, recipe: Any = None,  # noqa: ANN401
    reports: Mapping[str, Mapping[str, Any]] | None = None, tokenizer: Saves | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write the whole model to a new folder, which needs no file of the original model to load.

    ``tnc.json``, safetensors shards with the keys of ``model.state_dict()`` (tied tensors once), and for a Hugging
    Face model its ``config.json`` and ``generation_config.json``. The folder appears under ``path`` only when it is
    complete and on disk; a failure or an interrupt leaves nothing.

    Args:
        model: with `FactoredLinear` layers.
        path: folder to make.
        base: name of the dense model.
        recipe: JSON-able; ``None`` is what `tnc.compress` noted on the model.
        reports: layer name to JSON-able report; ``None`` is the ``report`` of each layer.
        tokenizer: written beside the model.
        overwrite: replace an existing tnc checkpoint, once the new one is complete.

    Returns:
        ``path``.

    Raises:
        CheckpointError: if ``path`` exists, the model holds no compressed layer, ``meta`` tensors or state that is
            no tensor, a report is not JSON-able, or writing fails (says the bytes needed and free).

    Cost: one pass over the tensors, a CPU copy of one shard (2 GB).
    """
    tensors, tied = _distinct(model)
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, FactoredLinear)}
    if not layers:
        raise CheckpointError(
            f"the model {type(model).__name__} holds no FactoredLinear layer; compress it first with tnc.compress."
        )
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) + _EXTRA_BYTES
    with new_folder(path, overwrite=overwrite, needed=needed) as folder:
        files, records = write_shards(folder, tensors)
        notes = {name: layer.report for name, layer in layers.items()} if reports is None else reports
        fields = {
            "tnc_version": _version(), "base": base,
            "recipe": getattr(model, "tnc_recipe", None) if recipe is None else recipe, "dtype": _dtype(model),
            "layers": {name: _describe(name, layer, notes.get(name)) for name, layer in layers.items()},
            "tied": tied, "files": files, "tensors": records, "siblings": sibling_groups(model),
        }  # fmt: skip
        write_manifest(folder, fields)
        _write_companions(model, tokenizer, folder)
    return Path(path)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that `save_checkpoint` writes for a model, tied ones once.

    Raises:
        CheckpointError: for tensors on ``meta``, or state that is no tensor.
    """
    return _distinct(model)[0]


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict without repeated tensors, and each left-out key with the key that holds its tensor."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise CheckpointError(
                f"the model's state {key!r} is {'on meta' if isinstance(tensor, Tensor) else type(tensor).__name__}; "
                "expected a tensor with numbers. Load the weights before saving, and keep other state elsewhere."
            )
        if first.setdefault(id(tensor), key) == key:
            tensors[key] = tensor
        else:
            tied[key] = first[id(tensor)]
    return tensors, tied


def _describe(name: str, layer: FactoredLinear, report: Mapping[str, Any] | None) -> dict[str, Any]:
    operator = layer.operator
    return {
        "shape": list(operator.shape),
        "bias": layer.bias is not None,
        **({"module": "embedding"} if isinstance(layer, FactoredEmbedding) else {}),
        "spec": operator.spec(),
        "tensors": {each: f"{name}.{each.replace('.', '_')}".lstrip(".") for each in operator.tensors()},
        "report": None if report is None else dict(report),
    }


def _dtype(model: nn.Module) -> str:
    """Dtype of the parameters that were not compressed, as the factors keep their own."""
    factored = {id(p) for m in model.modules() if isinstance(m, FactoredLinear) for p in m.parameters()}
    found = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in factored)
    return str(next(found, torch.float32)).removeprefix("torch.")


def _version() -> str:
    try:
        return metadata.version("tnc")
    except metadata.PackageNotFoundError:
        return "unknown"


def _write_companions(model: nn.Module, tokenizer: Saves | None, folder: Path) -> None:
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        config.save_pretrained(str(folder))
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
