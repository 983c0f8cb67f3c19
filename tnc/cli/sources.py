"""What the command line can name: model folders, checkpoints, text files, devices and the embedded demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnc.checkpoint import load_checkpoint
from tnc.errors import ModelError
from tnc.experts import unfuse_experts
from tnc.models.demo import demo_model_path, demo_text
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import read_text

DEMO = "demo"
_DEFAULT_CONTEXT = 512


def open_model(name: str, *, device: torch.device) -> tuple[nn.Module, Any]:
    """The model (dense folder, tnc checkpoint or the embedded one) in its stored dtype, and its tokenizer.

    Experts are unfused: each is a layer of its own.
    """
    path = demo_model_path() if name == DEMO else Path(name)
    if (path / "tnc.json").is_file():
        return load_checkpoint(path, device=device), load_tokenizer(path)
    model = load_model(path, dtype="as stored", device=device)
    unfuse_experts(model)
    return model, load_tokenizer(path)


def open_text(name: str, split: str) -> str:
    """A text file, or the named split of the embedded model's corpus for ``demo``."""
    return demo_text(split) if name == DEMO else read_text(name)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        ModelError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        message = f"device {name!r} cannot be used ({reason}); expected auto, cpu or a GPU such as cuda:0."
        raise ModelError(message) from error
    return device


def context_of(model: nn.Module) -> int:
    """512 tokens, or the longest the model can read if that is less."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(_DEFAULT_CONTEXT, limit) if isinstance(limit, int) else _DEFAULT_CONTEXT
