"""transformers, where it is installed, and models whose parameters hold no numbers yet."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tnc.errors import CheckpointError, ModelError


def import_transformers() -> ModuleType:
    """The module ``transformers``.

    Raises:
        ModelError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            'Hugging Face models need transformers, which is not installed; run: pip install "tnc[hf]".'
        ) from error


def dtype_option(transformers: ModuleType) -> str:
    """Name of the dtype option of transformers' constructors, which 4.56 renamed."""
    major, minor = transformers.__version__.split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (4, 56) else "torch_dtype"


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars and log lines from transformers inside; its settings are put back after."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def from_config(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The causal language model that ``folder/config.json`` describes: parameters on ``meta``, buffers real.

    Buffers outside the state dict (rotary frequencies, causal masks) are computed by the model's own constructor.

    Raises:
        CheckpointError: if there is no config, or transformers cannot build a model from it.
        ModelError: if transformers is not installed.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint {folder} has no config.json, so it is not of a Hugging Face model; pass "
            "load_checkpoint(path, model=...) a freshly built dense model, or use load_layers(path)."
        )
    transformers = import_transformers()
    try:
        with quiet(transformers), parameters_on_meta():
            return _build(transformers, folder, dtype)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise CheckpointError(
            f"no model could be built from {folder / 'config.json'}: {type(error).__name__}: {error}. Expected the "
            "config of a causal language model that this version of transformers knows."
        ) from error


def _build(transformers: ModuleType, folder: Path, dtype: torch.dtype) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    options = {dtype_option(transformers): dtype}
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, **options)
    if (folder / "generation_config.json").is_file():
        generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        model.generation_config = generation
    return model


def emptied(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its parameters on ``meta`` and its buffers copied; costs no parameter memory."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside, in this thread, put every parameter on ``meta`` at once; buffers stay real."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
