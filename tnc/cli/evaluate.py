"""``tnc eval``: scores of a dense or compressed model on a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tnc.cli import console
from tnc.cli.sources import open_model, open_text, resolve_device
from tnc.errors import FormatError, TextError
from tnc.models.evaluate import bits_per_weight, evaluate, model_bytes
from tnc.models.layers import select_layers, weight_of
from tnc.models.text import TokenWindows, token_windows
from tnc.modules import FactoredLinear
from tnc.ties import distinct_bits

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_evaluate(
    name: str, text: str, *, context: int, reference: str | None, limit: int | None, dtype: str, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Score and print."""
    if dtype not in _DTYPES:
        raise FormatError(f"--dtype {dtype} is unknown; expected one of {', '.join(_DTYPES)}.")
    place = resolve_device(device)
    model, tokenizer = open_model(name, device=place)
    sizes = stored_sizes(model)
    model = model.to(_DTYPES[dtype])
    dense = None if reference is None else open_model(reference, device=place)[0].to(_DTYPES[dtype])
    windows = token_windows(tokenizer, open_text(text, "evaluation"), context)
    windows = windows if limit is None else _first(windows, limit)
    with console.progress_bars() as progress:
        scores = evaluate(model, windows, reference=dense, progress=progress)
    result: dict[str, Any] = {"model": name, "text": text, "context": context, **scores.to_json(), **sizes}
    if as_json:
        console.print_json(result)
        return
    rows = [(key, console.number(value, 6) if isinstance(value, float) else str(value)) for key, value in result.items()
            if value is not None]  # fmt: skip
    console.print_table("Evaluation", ("what", "value"), rows)


def stored_sizes(model: nn.Module) -> dict[str, float | int]:
    """Bits per weight and bytes of the compressed layers (of the dense ones in a dense model), and of all of it."""
    factored = [m for m in model.modules() if isinstance(m, FactoredLinear)]
    bits = bits_per_weight(model)
    if factored and bits is not None:
        linear = distinct_bits(factored) // 8
    else:
        weights = [weight_of(layer) for layer in select_layers(model).values()]
        linear = sum(w.numel() * w.element_size() for w in weights)
        bits = 8.0 * linear / sum(w.numel() for w in weights)
    return {"bits_per_weight": bits, "linear_bytes": linear, "model_bytes": model_bytes(model)}


def _first(windows: TokenWindows, limit: int) -> TokenWindows:
    """The first ``limit`` windows."""
    if limit < 1:
        raise TextError(f"--limit {limit} leaves no window to score; use at least 1.")
    end = limit * windows.context
    return TokenWindows(windows.tokens[:end], windows.byte_lengths[:end], windows.context)
