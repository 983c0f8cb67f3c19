"""Calibration's forward pass: H of every block, first to last, with hidden states of one depth kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tnc.models.blocks import quiet
from tnc.models.calibration_job import CalibrationJob
from tnc.models.capture import InputCapture, Slot, recorded_inputs
from tnc.models.collect import collect
from tnc.models.hidden_states import HiddenStates
from tnc.stats import LayerStats, Moments


def forward_stats(
    job: CalibrationJob, states: HiddenStates, gradients: Mapping[str, Moments], *, sequential: bool, asymmetric: bool
) -> Iterator[tuple[int, dict[str, LayerStats]]]:
    """Statistics of the selected layers, first block to last; see `iter_block_stats` for the modes."""
    last = max(job.groups)
    for index in range(last + 1):
        layers = job.groups.get(index, {})
        captures = InputCapture(layers), InputCapture(layers)
        for number, batch in enumerate(job.sequences):
            dense = _dense_step(job, states, (index, number)) if asymmetric else None
            _forward_step(job, states, (index, number), captures[batch.heldout], dense, keep_input=sequential)
            job.tell("statistics", index * len(job.sequences) + number + 1, (last + 1) * len(job.sequences))
        if layers:
            group = collect(layers, captures, {name: gradients.get(name) for name in layers}, job.tokens)
            del captures
            yield index, group
            del group
        if sequential and index < last:
            for number, _ in enumerate(job.sequences):
                _advance(job, states, (index, number))


def _forward_step(
    job: CalibrationJob, states: HiddenStates, place: tuple[int, int], capture: InputCapture,
    dense: Mapping[Slot, Tensor] | None, *, keep_input: bool,
) -> None:  # fmt: skip
    """One block on one batch: capture its layers' inputs; keep its output, or its input to run it again."""
    index, number = place
    with quiet(job.model), torch.no_grad():
        call = job.call(job.sequences[number], index)
        hidden = states.take(("hidden", index, number)) if index else call.hidden
        with capture.watching(dense):
            output = job.walk.run(index, hidden, call)
    if index < max(job.groups):
        key = ("hidden", index, number) if keep_input else ("hidden", index + 1, number)
        states.put(key, hidden if keep_input else output)


def _dense_step(job: CalibrationJob, states: HiddenStates, place: tuple[int, int]) -> dict[Slot, Tensor]:
    """Layer inputs of one block on one batch as the model as given has them; keeps its output for the next block."""
    index, number = place
    with quiet(job.model), torch.no_grad():
        call = job.call(job.sequences[number], index)
        hidden = states.take(("dense", index, number)) if index else call.hidden
        with recorded_inputs(job.groups.get(index, {})) as found:
            output = job.walk.run(index, hidden, call)
    if index < max(job.groups):
        states.put(("dense", index + 1, number), output)
    return found


def _advance(job: CalibrationJob, states: HiddenStates, place: tuple[int, int]) -> None:
    """Replace the input of a block by its output, with the layers it has now."""
    index, number = place
    with quiet(job.model), torch.no_grad():
        call = job.call(job.sequences[number], index)
        output = job.walk.run(index, states.take(("hidden", index, number)), call)
    states.put(("hidden", index + 1, number), output)
