"""Reading a compressed model back, every byte checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnc.checkpoint.manifest import read_manifest
from tnc.checkpoint.shards import read_shards
from tnc.checkpoint.skeleton import emptied, from_config
from tnc.embedding import FactoredEmbedding
from tnc.errors import CheckpointError, TNCError
from tnc.experts import fused_experts, unfuse_experts
from tnc.modules import FactoredLinear
from tnc.siblings import join_siblings
from tnc.terms import Expression, from_spec, map_tensors
from tnc.ties import keep_ties


def load_checkpoint(
    path: str | Path, *, model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The compressed model of a folder written by `save_checkpoint`, in eval mode.

    Args:
        path: the folder.
        model: for models that are not from Hugging Face: a freshly built dense model of the same architecture.
            It is copied, not changed; its parameters may be on ``meta``, its buffers may not.
        device: where the model goes.

    Returns:
        The model with its `FactoredLinear` layers (each with its ``report``); parameters and the buffers of the
        state dict bit for bit as saved. Other buffers (rotary frequencies) are computed by the model's
        constructor, in its own precision. No weight of the original model is read and none is left at random.

    Raises:
        CheckpointError: if the folder is not a checkpoint, of a newer version, damaged, or not of this model;
            names the file and layer.
        ModelError: if a Hugging Face model is to be built and transformers is not installed.

    Memory: the stored tensors only; the dense weights are never allocated.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    tensors = read_shards(folder, manifest["tensors"], manifest["files"], manifest["tensors"])
    skeleton = from_config(folder, _dtype(folder, manifest)) if model is None else emptied(model)
    tensors |= {key: tensors[source] for key, source in manifest["tied"].items()}
    unfuse_experts(
        skeleton, [n for n in fused_experts(skeleton) if any(k.startswith(f"{n}.down_proj.") for k in tensors)]
    )
    for name, layer in manifest["layers"].items():
        _swap(skeleton, name, layer, _operator(folder, name, layer, tensors))
    _assign(folder, skeleton, tensors, manifest["tied"])
    _join(folder, skeleton, manifest)
    skeleton.tnc_recipe = manifest.get("recipe")  # type: ignore[assignment]
    return skeleton.to(device).eval()


def load_layers(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, FactoredLinear]:
    """The compressed layers of a checkpoint by name, without the rest of the model; transformers is not needed.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    layers, tied = manifest["layers"], manifest["tied"]
    keys = [key for name, layer in layers.items() for key in _keys(name, layer)]
    needed = dict.fromkeys(tied.get(key, key) for key in keys)
    tensors = read_shards(folder, needed, manifest["files"], manifest["tensors"])
    tensors |= {key: tensors[tied[key]] for key in keys if key in tied}
    loaded = {}
    for name, layer in layers.items():
        bias = tensors[_bias_key(name)] if layer["bias"] else None
        loaded[name] = _module(layer)(_operator(folder, name, layer, tensors), bias).to(device).eval()
        loaded[name].report = layer["report"]
    return loaded


def _module(layer: Mapping[str, Any]) -> type[FactoredLinear]:
    """The class of a layer; earlier checkpoints do not name it."""
    return FactoredEmbedding if layer.get("module") == "embedding" else FactoredLinear


def _keys(name: str, layer: Mapping[str, Any]) -> list[str]:
    return [*layer["tensors"].values(), *([_bias_key(name)] if layer["bias"] else [])]


def _bias_key(name: str) -> str:
    return f"{name}.bias".lstrip(".")


def _operator(folder: Path, name: str, layer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Expression:
    try:
        return from_spec(layer["spec"], {each: tensors[key] for each, key in layer["tensors"].items()})
    except (TNCError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"layer {name!r} of checkpoint {folder} cannot be rebuilt: {reason}") from error


def _swap(model: nn.Module, name: str, layer: Mapping[str, Any], operator: Expression) -> None:
    """Put a factored layer without numbers in the place of the dense one; `_assign` fills it."""
    parent, _, child = name.rpartition(".")
    try:
        dense = model.get_submodule(name)
        empty = _module(layer).from_linear(dense, map_tensors(operator, lambda t: t.to("meta")))
    except (AttributeError, TNCError) as error:
        raise CheckpointError(
            f"layer {name!r} of the checkpoint does not fit {type(model).__name__}: {error} "
            "Pass a dense model of the architecture that was saved."
        ) from error
    empty.report = layer["report"]
    setattr(model.get_submodule(parent), child, empty)


def _assign(folder: Path, model: nn.Module, tensors: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    """Give every parameter and buffer its stored tensor and tie again what was tied."""
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the tensors of checkpoint {folder} are not those of {type(model).__name__}: {reason} "
            "Pass a dense model of the architecture that was saved."
        ) from error
    for key, source in tied.items():
        _set(model, key, _get(model, source))
    keep_ties([module for module in model.modules() if isinstance(module, FactoredLinear)])
    empty = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise CheckpointError(
            f"the model given has buffers on meta that no checkpoint stores, the first {empty[0]!r}; build it on "
            "the CPU (its parameters may be on meta)."
        )


def _join(folder: Path, model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Siblings as they were saved; earlier checkpoints name none."""
    try:
        join_siblings(model, manifest.get("siblings", []))
    except (TNCError, TypeError) as error:
        raise CheckpointError(f"the siblings in tnc.json of {folder} are not those of its layers: {error}") from error


def _get(model: nn.Module, key: str) -> Tensor:
    parent, _, leaf = key.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(parent), leaf)
    return tensor


def _set(model: nn.Module, key: str, tensor: Tensor) -> None:
    parent, _, leaf = key.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)


def _dtype(folder: Path, manifest: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, str(manifest["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"tnc.json of {folder} has dtype {manifest['dtype']!r}; expected a torch dtype such as bfloat16. "
            "Copy the checkpoint again."
        )
    return dtype
