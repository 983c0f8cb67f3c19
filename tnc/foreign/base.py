"""The quantized or pruned folder of another tool as bases: a term for every layer, and the tensors beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tnc.errors import CheckpointError, ModelError
from tnc.foreign.layouts import READERS
from tnc.terms import Expression, Sparse

_SPARSE_SHARE = 0.3  # of zeros from which a dense matrix counts as pruned: a mask pays from 1/16 on
_CLOSE = 2e-2  # relative difference that another dtype can make


@dataclass(frozen=True, eq=False)
class Base:
    """What another tool made of a model.

    Attributes:
        layers: layer name -> its term, bit for bit what the folder holds.
        rest: every other tensor by name.
        method: ``"gptq"``, ``"awq"``, ``"compressed-tensors"``, ``"bitsandbytes"`` or ``"sparse"``.
    """

    layers: Mapping[str, Expression]
    rest: Mapping[str, Tensor]
    method: str

    def check_model(self, model: nn.Module) -> None:
        """Raise unless the folder was made from this model, up to the layers it quantized.

        Raises:
            ModelError: for a layer that the model lacks or that has another shape, or another tensor that differs:
                a tool that scales norms (AWQ, SmoothQuant) made layers that fit its own norms only.
        """
        modules, state = dict(model.named_modules()), model.state_dict()
        for name, term in self.layers.items():
            weight = getattr(modules.get(name), "weight", None)
            if not isinstance(weight, Tensor) or tuple(weight.shape) != term.shape:
                raise ModelError(
                    f"the base holds layer {name!r} of shape {term.shape}; the model has "
                    f"{'no such layer' if weight is None else tuple(weight.shape)}. Pass the model it was made from."
                )
        for name, tensor in self.rest.items():
            own = state.get(name)
            if own is None or own.shape != tensor.shape or not tensor.is_floating_point():
                continue
            difference = float((own.double().cpu() - tensor.double()).norm())
            if difference > _CLOSE * float(own.double().norm()):
                raise ModelError(
                    f"{name!r} of the base differs from that of the model by {difference:.3g}: the tool rescaled it, "
                    "so the quantized layers stand for other weights than the model's. Quantize without folding scales "
                    "into the norms, or pass the dense model with the same scales folded in."
                )


def load_base(folder: str | Path) -> Base:
    """Read a folder that GPTQModel, AutoGPTQ, AutoAWQ, compressed-tensors or bitsandbytes wrote, or a pruned one.

    Args:
        folder: ``config.json`` (with ``quantization_config`` unless pruned) and safetensors weights.

    Returns:
        The terms decode to what the tool itself decodes to, bit for bit where that is defined in float32.

    Raises:
        CheckpointError: for a missing or damaged folder, an unknown method or layout (lists the known), an act-order
            index out of range, or a layer whose tensors do not fit; names the layer.

    Memory: the folder's tensors.
    """
    path = Path(folder)
    config = _quantization_config(path)
    tensors = _read_all(path)
    if config is None:
        return _sparse(path, tensors)
    method = str(config.get("quant_method", "")).lower()
    if method not in READERS:
        raise CheckpointError(
            f"folder {path} has quant_method {method or None!r}; expected one of {', '.join(READERS)}, or a pruned "
            "model without quantization_config."
        )
    layers, taken = {}, set()
    required, optional, reader = READERS[method]
    for name in sorted(key.removesuffix(f".{required[0]}") for key in tensors if key.endswith(f".{required[0]}")):
        parts = {s: tensors[f"{name}.{s}"] for s in (*required, *optional) if f"{name}.{s}" in tensors}
        missing = [s for s in required if s not in parts]
        if missing:
            raise CheckpointError(f"layer {name!r} of {path} lacks {', '.join(missing)}; copy the folder again.")
        try:
            layers[name] = reader(parts, config)
        except (CheckpointError, ValueError, KeyError) as error:
            raise CheckpointError(f"layer {name!r} of {path}: {error}") from error
        taken |= {f"{name}.{s}" for s in parts}
    if not layers:
        raise CheckpointError(f"folder {path} says {method} and holds no layer with {required[0]}; copy it again.")
    return Base(layers, {k: t for k, t in tensors.items() if k not in taken}, method)


def _sparse(path: Path, tensors: Mapping[str, Tensor]) -> Base:
    """Matrices of a dense folder with many zeros; embeddings are looked up, not multiplied, and stay out."""
    layers = {
        key.removesuffix(".weight"): Sparse.of(tensor)
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.ndim == 2 and "embed" not in key
        if float((tensor == 0).float().mean()) >= _SPARSE_SHARE
    }
    if not layers:
        raise CheckpointError(
            f"folder {path} has no quantization_config and no matrix with {_SPARSE_SHARE:.0%} zeros; expected a "
            f"quantized folder ({', '.join(READERS)}) or a pruned one."
        )
    return Base(layers, {k: t for k, t in tensors.items() if k.removesuffix(".weight") not in layers}, "sparse")


def _quantization_config(path: Path) -> dict[str, Any] | None:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"folder {path} has no config.json; expected a folder that a quantization tool wrote.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'} is not JSON ({error}); copy the folder again.") from error
    found = config.get("quantization_config")
    return None if found is None else dict(found)


def _read_all(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"folder {path} has no safetensors weights; expected some beside config.json.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Copy it again.") from error
    return tensors
