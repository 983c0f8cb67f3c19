"""What the benchmarks of plans start from: a model, its statistics, windows to score, and scores of planned layers."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.portfolio import on_cpu
from benchmarks.windows import spread
from benchmarks.workshop import Made, Workshop
from tnc import LayerStats, Portfolio, calibrate, load_stats
from tnc.checkpoint import Journal
from tnc.experts import unfuse_experts
from tnc.models.evaluate import Evaluation, evaluate_many
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.layers import select_layers, weight_of
from tnc.models.probes import Probe, probe_plan
from tnc.models.text import Tokenizer, calibration_batches, read_text, token_windows
from tnc.planning import CurveTable

DTYPE = torch.float16
"""Of factors and dense layers."""


def parser(description: str | None, *, out: str) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model", type=Path, nargs="?")
    found.add_argument("--calib", type=Path, help="calibration text")
    found.add_argument("--stats", type=Path, help="statistics in the place of --calib, for one seed")
    found.add_argument("--text", type=Path, help="held-out text")
    found.add_argument("--sequences", type=int, default=128)
    found.add_argument("--context", type=int, default=512)
    found.add_argument("--windows", type=int, default=48, help="evenly spread over the text")
    found.add_argument("--experts", action="store_true", help="experts as layers of their own")
    found.add_argument("--jobs", type=int, default=2)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--fitted", type=Path, help="folder that keeps fitted bases; default a temporary one")
    found.add_argument("--probes", type=int, default=0, help="windows of the calibration text that probe each layer")
    found.add_argument("--curves", type=Path, help="file that keeps the curves of one seed")
    found.add_argument("--out", type=Path, default=Path(out))
    return found


@dataclass(frozen=True, eq=False)
class Start:
    """A model that is about to be planned.

    Attributes:
        model: dense, on the CPU, experts unfused where asked.
        dense: the same on the device, to score by.
        tokenizer: of the model.
        weights: of the layers that are planned.
        windows: of the held-out text; none without one.
    """

    model: nn.Module
    dense: nn.Module
    tokenizer: Tokenizer
    weights: Mapping[str, Tensor]
    windows: list[Tensor]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Start:
        """Load everything."""
        model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
        if arguments.experts:
            unfuse_experts(model)
        weights = {name: weight_of(layer).detach().clone() for name, layer in select_layers(model).items()}
        dense = copy.deepcopy(model).to(arguments.device)
        windows = []
        if arguments.text is not None:
            whole = token_windows(tokenizer, read_text(arguments.text), arguments.context, keep_last=False)
            windows = spread(whole, arguments.windows)
        return cls(model, dense, tokenizer, weights, windows)

    def statistics(self, arguments: argparse.Namespace, seed: int) -> dict[str, LayerStats]:
        """Of one sample of the calibration text, or from the file."""
        if arguments.stats is not None:
            return dict(load_stats(arguments.stats))
        return on_cpu(calibrate(self.dense, self.calibration(arguments, seed), seed=seed))

    def calibration(self, arguments: argparse.Namespace, seed: int) -> list[Tensor]:
        """A sample of the calibration text, on the device."""
        batches = calibration_batches(
            self.tokenizer, read_text(arguments.calib), context=arguments.context, sequences=arguments.sequences,
            seed=seed,
        )  # fmt: skip
        device = next(self.dense.parameters()).device
        return [batch.to(device) for batch in batches]

    @contextmanager
    def workshop(
        self, arguments: argparse.Namespace, stats: Mapping[str, LayerStats], portfolio: Portfolio
    ) -> Iterator[Workshop]:
        """A workshop over these layers; without ``--fitted`` its folder ends with it."""
        with tempfile.TemporaryDirectory() as folder:
            fitted = Journal(arguments.fitted or folder)
            yield Workshop(self.weights, stats, portfolio, DTYPE, fitted, arguments.jobs)

    def scores(self, matrices: Mapping[str, Tensor]) -> Evaluation:
        """The model with some weights replaced, on held-out text."""
        return self.scores_of([matrices])[0]

    def scores_of(
        self, every: Sequence[Mapping[str, Tensor]], windows: Sequence[Tensor] | None = None
    ) -> list[Evaluation]:
        """The same for several models, 8 at a time beside the dense one; on other windows where they are given."""
        found: list[Evaluation] = []
        for first in range(0, len(every), 8):
            models = {str(at): copy.deepcopy(self.dense) for at in range(first, min(first + 8, len(every)))}
            for at, model in models.items():
                for name, matrix in every[int(at)].items():
                    weight_of(model.get_submodule(name)).data.copy_(matrix)
            scores = evaluate_many(models, self.windows if windows is None else windows, reference=self.dense)
            found += [scores[at] for at in models]
        return found


def probe_weights(
    arguments: argparse.Namespace, start: Start, shop: Workshop, table: CurveTable, seed: int
) -> dict[str, float]:
    """`tnc.models.probes` with layers from the workshop, on the first windows of the calibration sample."""
    plan = probe_plan(table)
    made = next(layers for _, layers in shop.made([plan]))
    windows = [row for batch in start.calibration(arguments, seed) for row in batch][: arguments.probes]
    scores = start.scores_of([{name: layer.matrix} for name, layer in made.items()], windows)
    return {name: Probe(plan.layers[name].choice, made[name].nats, each.kl or 0.0).weight
            for name, each in zip(made, scores, strict=True)}  # fmt: skip


def totals(made: Mapping[str, Made]) -> dict[str, Any]:
    """Bits, held-out error and prediction of a plan's layers, as stored."""
    elements = sum(layer.matrix.numel() for layer in made.values())
    return {
        "bits_per_weight": sum(layer.bits for layer in made.values()) / elements,
        "heldout": sum(layer.heldout for layer in made.values()) / len(made),
        "predicted_nats": sum(layer.nats for layer in made.values()),
    }
