"""Calibration as commands ask for it: a statistics file that is read if it exists, a text otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tnc.cli import console
from tnc.cli.sources import context_of, open_text
from tnc.models.calibrate import calibrate
from tnc.models.text import full_windows, sample_windows
from tnc.stats import LayerStats
from tnc.stats_file import load_stats, save_stats

_BATCH = 8  # sequences


class CalibrationOptions(Protocol):
    """What a command knows of the calibration that was asked for."""

    @property
    def calib(self) -> str | None:
        """Text."""

    @property
    def stats(self) -> Path | None:
        """Statistics file."""

    @property
    def sequences(self) -> int:
        """Calibration sequences."""

    @property
    def context(self) -> int | None:
        """Tokens a sequence."""

    @property
    def fisher(self) -> bool:
        """Whether gradients are calibrated."""

    @property
    def include(self) -> list[str] | None:
        """Layer name patterns."""

    @property
    def exclude(self) -> list[str] | None:
        """Layer name patterns left out."""

    @property
    def seed(self) -> int:
        """Of sampled windows and labels."""


def calibration_data(
    options: CalibrationOptions,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    progress: console.Report,
) -> dict[str, Any]:
    """``stats`` or ``batches`` for `compress`; neither without calibration text."""
    if options.stats is not None and options.stats.exists():
        return {"stats": load_stats(options.stats)}
    if options.calib is None:
        return {}
    context = context_of(model) if options.context is None else options.context
    text = open_text(options.calib, "calibration")
    windows = full_windows(tokenizer, text, context=context)
    if len(windows) < options.sequences:
        console.note(
            f"all {len(windows)} full windows of {context} tokens are used; {options.sequences} were asked for."
        )
    chosen = sample_windows(windows, min(options.sequences, len(windows)), seed=options.seed)
    batches = list(torch.split(chosen, _BATCH))
    if options.stats is None:
        return {"batches": batches}
    return {"stats": _calibrated(options, options.stats, model, batches, progress)}


def _calibrated(
    options: CalibrationOptions, path: Path, model: nn.Module, batches: list[torch.Tensor], progress: console.Report
) -> dict[str, LayerStats]:
    stats = calibrate(
        model, batches, fisher=options.fisher, include=options.include, exclude=options.exclude, seed=options.seed,
        progress=progress,
    )  # fmt: skip
    save_stats(stats, path)
    return stats
