"""Hugging Face causal language models and tokenizers from local folders; nothing is ever downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tnc.checkpoint.skeleton import dtype_option, import_transformers, quiet
from tnc.errors import ModelError
from tnc.models.text import Tokenizer

_WEIGHTS = ("*.safetensors",)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_model(
    path: str | Path, *, dtype: torch.dtype | Literal["as stored"] = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:  # fmt: skip
    """The causal language model of a Hugging Face folder, in eval mode.

    Args:
        path: folder with ``config.json`` and safetensors weights.
        dtype: dtype of the weights in memory, or ``"as stored"`` for the file's own.
        device: where the weights go.

    Raises:
        ModelError: if the folder or its config or weights are missing, if there are only pickle files, or if
            a weight file is damaged or lacks tensors of the model.
    """
    folder = _check_folder(path)
    _check_weights(folder)
    transformers = import_transformers()
    with quiet(transformers):
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True,
                **{dtype_option(transformers): "auto" if dtype == "as stored" else dtype},
            )  # fmt: skip
            _check_complete(folder, info)
            moved: nn.Module = model.to(device).eval()
        except ModelError:
            raise
        except Exception as error:  # transformers raises many kinds for one bad folder
            raise ModelError(
                f"model folder {folder} could not be loaded: {type(error).__name__}: {error}. "
                "Expected a causal language model that transformers knows, with complete safetensors files."
            ) from error
    return moved


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        ModelError: if the folder is missing or holds no tokenizer that transformers can read.
    """
    folder = _check_exists(path)
    transformers = import_transformers()
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise ModelError(
            f"folder {folder} has no tokenizer files; expected tokenizer.json and tokenizer_config.json. "
            "Copy them from the original model."
        )
    with quiet(transformers):
        try:
            tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for one bad folder
            raise ModelError(
                f"tokenizer of {folder} could not be loaded: {type(error).__name__}: {error}. "
                "Copy tokenizer.json and tokenizer_config.json from the original model."
            ) from error
    return tokenizer


def _check_exists(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist; expected a local folder with config.json and "
            "model.safetensors. Models are not downloaded: fetch the folder first."
        )
    return folder


def _check_folder(path: str | Path) -> Path:
    folder = _check_exists(path)
    if (folder / "tnc.json").is_file():
        raise ModelError(f"folder {folder} is a tnc checkpoint, not a dense model; use tnc.load_checkpoint.")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {folder} has no config.json; expected a Hugging Face causal language model. "
            "Save one with model.save_pretrained(folder)."
        )
    return folder


def _check_weights(folder: Path) -> None:
    if _files(folder, _WEIGHTS):
        return
    pickles = _files(folder, _PICKLES)
    if pickles:
        raise ModelError(
            f"model folder {folder} holds its weights only as pickle ({', '.join(pickles)}), which can run "
            "code when read and is refused; expected safetensors. Convert it where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise ModelError(
        f"model folder {folder} has no weights; expected model.safetensors or model-00001-of-N.safetensors "
        "beside config.json. Download the folder again, with its large files."
    )


def _files(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted(file.name for pattern in patterns for file in folder.glob(pattern))


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model with tensors that the files lack: transformers fills them with random numbers."""
    missing = sorted(str(key) for key in info["missing_keys"])
    if missing:
        raise ModelError(
            f"the weight files of {folder} lack {len(missing)} tensors of the model, the first {missing[0]}; "
            "expected all of them. Download the folder again, or save the model with model.save_pretrained."
        )
