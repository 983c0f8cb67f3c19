"""transformers, where it is installed, and a model without numbers built from its config."""

from __future__ import annotations

import importlib
from types import ModuleType

from tnc.errors import ModelError


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
