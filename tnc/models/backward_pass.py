"""Calibration's backward pass: G of every block, last to first, each recomputed from its kept input."""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.models.blocks import quiet
from tnc.models.calibration_job import CalibrationJob
from tnc.models.capture import GradientCapture, InputCapture
from tnc.models.collect import collect
from tnc.models.hidden_states import HiddenStates
from tnc.models.labels import loss_gradient
from tnc.stats import LayerStats, Moments


def forward_and_label(job: CalibrationJob, states: HiddenStates) -> None:
    """Keep the input of every block that is needed, and the loss gradient at the output of the last block."""
    first, blocks = min(job.groups), len(job.walk.blocks)
    for number, batch in enumerate(job.sequences):
        with quiet(job.model):
            ids = job.ids(batch)
            with torch.no_grad():
                calls = job.walk.calls(ids)
                hidden = calls[0].hidden
                for index in range(max(job.groups) + 1 if batch.heldout else blocks):
                    if index >= first:
                        states.put(("hidden", index, number), hidden)
                    hidden = job.walk.run(index, hidden, calls[index])
            if not batch.heldout:
                gradient = loss_gradient(job.walk, ids, hidden, batch.indices, seed=job.seed)
                states.put(("gradient", blocks - 1, number), gradient)
        job.tell("forward", number + 1, len(job.sequences))


def backward_stats(job: CalibrationJob, states: HiddenStates, index: int) -> dict[str, LayerStats]:
    """Statistics of one block, recomputed with its graph; hands the gradient to the block before."""
    layers = job.groups.get(index, {})
    captures = InputCapture(layers), InputCapture(layers)
    gradients = GradientCapture(layers)
    _backward(job, states, index, gradients, captures)
    return collect(layers, captures, gradients.moments(), job.tokens)


def backward_gradients(job: CalibrationJob, states: HiddenStates, index: int) -> dict[str, Moments]:
    """G alone of one block; hands the gradient to the block before."""
    layers = job.groups.get(index, {})
    gradients = GradientCapture(layers)
    _backward(job, states, index, gradients, (InputCapture({}), InputCapture({})))
    return gradients.moments()


def _backward(
    job: CalibrationJob, states: HiddenStates, index: int, gradients: GradientCapture,
    captures: tuple[InputCapture, InputCapture],
) -> None:  # fmt: skip
    first, last = min(job.groups), len(job.walk.blocks) - 1
    for number, batch in enumerate(job.sequences):
        if not batch.heldout:
            gradient = _backward_step(job, states, (index, number), gradients, captures[0])
            if index > first:
                states.put(("gradient", index - 1, number), gradient)
        elif index <= max(job.groups):
            hidden = states.take(("hidden", index, number))
            with quiet(job.model), torch.no_grad(), captures[1].watching():
                job.walk.run(index, hidden, job.call(batch, index))
        done = (last - index) * len(job.sequences) + number + 1
        job.tell("backward", done, (last - first + 1) * len(job.sequences))


def _backward_step(
    job: CalibrationJob, states: HiddenStates, place: tuple[int, int], gradients: GradientCapture, capture: InputCapture
) -> Tensor:
    """One block forward and backward on one batch: the loss gradient at its input, zero for token ids."""
    index, number = place
    leaf = states.take(("hidden", index, number))
    arriving = states.take(("gradient", index, number))
    with quiet(job.model), torch.enable_grad():
        call = job.call(job.sequences[number], index)
        if leaf.is_floating_point():
            leaf.requires_grad_()
        with capture.watching(), gradients.watching():
            output = job.walk.run(index, leaf, call)
            if output.requires_grad:
                output.backward(arriving)  # type: ignore[no-untyped-call]
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
