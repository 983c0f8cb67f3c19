"""What the benchmarks of plans start from: a model, its statistics and the error curves of the default portfolio."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from tnc import LayerStats, Portfolio, error_curves, load_stats
from tnc.experts import unfuse_experts
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import Tokenizer
from tnc.planning import CurveTable

DTYPE = torch.float16
"""Of factors and dense layers."""


def parser(description: str | None, *, windows: int, out: str) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model", type=Path)
    found.add_argument("--stats", type=Path, required=True)
    found.add_argument("--text", type=Path, required=True)
    found.add_argument("--curves", type=Path)
    found.add_argument("--windows", type=int, default=windows)
    found.add_argument("--context", type=int, default=512)
    found.add_argument("--out", type=Path, default=Path(out))
    return found


def measured(arguments: argparse.Namespace) -> tuple[nn.Module, Tokenizer, dict[str, LayerStats], CurveTable]:
    """Model with its experts as layers of their own, tokenizer, statistics, curves (measured where there are none)."""
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    unfuse_experts(model)
    stats = load_stats(arguments.stats)
    table = error_curves(model, stats, Portfolio.default(), dtype=DTYPE, cache=arguments.curves)
    return model, tokenizer, stats, table
