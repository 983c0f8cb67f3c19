"""Calibration: the statistics of every linear layer of a model, one block at a time.

H needs one forward pass. G needs one backward pass as well; activations are recomputed block by block, so
that at any time the graph and the statistics of one block are alive, beside the hidden states between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnc.errors import ModelError, StatsError
from tnc.models.blocks import BlockCall, BlockWalk, quiet
from tnc.models.capture import GradientCapture, InputCapture, Slot, recorded_inputs
from tnc.models.collect import collect
from tnc.models.hidden_states import HiddenStates
from tnc.models.labels import loss_gradient
from tnc.models.layers import select_layers
from tnc.models.sequences import Batch, SequenceBatch, read_sequences
from tnc.stats import LayerStats, Moments

__all__ = ["Batch", "calibrate", "iter_block_stats"]

Progress = Callable[[str, int, int], None]
BlockStats = tuple[int, dict[str, LayerStats]]


def calibrate(
    model: nn.Module, batches: Iterable[Batch], *, fisher: bool = True, heldout_share: float = 0.1,
    include: Iterable[str] | None = None, exclude: Iterable[str] | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, LayerStats]:  # fmt: skip
    """Statistics of the selected layers of a model on calibration text, in model order.

    ``H`` is the plain mean of ``x xᵀ`` over calibration tokens; ``G`` that of ``g gᵀ``, ``g`` the gradient
    at the layer's output of the loss ``-log p(label)`` summed over all tokens of the sequence, one label
    sampled at each from the model's own logits. Neither depends on how sequences are grouped in batches, nor
    on padding.

    Args:
        model: a causal LM, or any module from token ids (sequences, tokens) to logits. Runs in eval mode;
            left as it was, also after an error.
        batches: token ids (sequences, tokens), or dicts with ``input_ids`` and ``attention_mask``. Masked
            tokens are cut out. Read once, token ids kept in memory.
        fisher: calibrate ``G`` too.
        heldout_share: share of the sequences, evenly spread, kept out of H and G; their inputs are
            ``heldout``.
        include: glob patterns on layer names, see `select_layers`.
        exclude: the same, of layers to leave out.
        seed: of the labels; sequence i draws from ``(seed, i)``.
        progress: called with (stage, done, total); stages are ``forward``, then ``backward`` with
            ``fisher``, or ``statistics`` without.

    Returns:
        Layers that see one input tensor share one `Moments` object.

    Raises:
        StatsError: for zero calibration tokens, or a layer that no calibration token reaches.
        ModelError: for patterns that match nothing, or token ids that the model does not have.
        NonFiniteError: for NaN or Inf in weights, activations or gradients; names the layer.
        ShapeError: for batches that are not token ids.

    Cost: a forward pass, with ``fisher`` two and a backward pass, and ``2 T (n² + m²)`` flops a layer.
    Memory: the statistics of all layers, float64; drop them block by block with `iter_block_stats`.
    Source: K-FAC with sampled labels (arXiv:1503.05671, section 2); as an LM metric YAQA (arXiv:2505.22988).
    """
    collected: dict[str, LayerStats] = {}
    for _, group in iter_block_stats(
        model, batches, fisher=fisher, heldout_share=heldout_share, include=include, exclude=exclude,
        seed=seed, progress=progress,
    ):  # fmt: skip
        collected.update(group)
    return {name: collected[name] for name, _ in model.named_modules() if name in collected}


def iter_block_stats(
    model: nn.Module, batches: Iterable[Batch], *, fisher: bool = True, heldout_share: float = 0.1,
    include: Iterable[str] | None = None, exclude: Iterable[str] | None = None, seed: int = 0,
    sequential: bool = False, asymmetric: bool = False, memory_limit_bytes: int = 4 * 2**30,
    progress: Progress | None = None,
) -> Iterator[BlockStats]:  # fmt: skip
    """Statistics block by block: (block index, {layer: statistics}) for each block with selected layers.

    Between two steps the model is in its original state, and the caller may replace the layers just yielded.

    - ``fisher=False``: first block to last, one forward pass.
    - ``fisher=True``: **last block to first**, after a forward pass that keeps the input of every block.
    - ``sequential=True``: first to last; a block's H is measured behind the earlier blocks as they are then,
      with the layers the caller has put in. With ``fisher`` all G come first, from the model as given.
    - ``asymmetric=True`` (with ``sequential``): the inputs of the model as given run along, one pass more a block, and
      moments hold the ``cross`` moment of both (GPTAQ, arXiv:2504.02692).

    Without ``sequential`` every statistic is of the model as given. Hidden states beyond
    ``memory_limit_bytes`` go to temporary files, exactly. The other arguments and the errors are those of
    `calibrate`.

    Memory: the graph of one block for one batch, H and G of one block, hidden states of T tokens: one per
    token with ``fisher=False``, one per token and block with ``fisher``. ``fisher`` and ``sequential``
    together also keep G of all layers (``m²`` float64 each). Nothing of a block is kept here once it is
    yielded.
    """
    if asymmetric and not sequential:
        raise StatsError(
            "asymmetric=True pairs inputs behind compressed layers with those of the model as given, so it needs "
            "sequential=True; pass both, or neither."
        )
    layers = select_layers(model, include, exclude)
    sequences = read_sequences(batches, heldout_share)
    _check_fits(model, sequences)
    walk = BlockWalk(model, _on_device_of(model, sequences[0].ids))
    job = _Job(model, walk, _by_block(layers, walk), sequences, seed, progress)
    with HiddenStates(memory_limit_bytes) as states:
        if not fisher:
            yield from _forward_stats(job, states, {}, sequential=sequential, asymmetric=asymmetric)
            return
        _forward_and_label(job, states)
        backwards = range(len(walk.blocks) - 1, min(job.groups) - 1, -1)
        if sequential:
            gradients: dict[str, Moments] = {}
            for index in backwards:
                gradients.update(_backward_gradients(job, states, index))
            yield from _forward_stats(job, states, gradients, sequential=True, asymmetric=asymmetric)
            return
        for index in backwards:
            group = _backward_stats(job, states, index)
            if group:
                yield index, group
            del group


@dataclass(frozen=True, eq=False)
class _Job:
    """One calibration: ``groups`` holds the selected layers of each block that has any, in order."""

    model: nn.Module
    walk: BlockWalk
    groups: Mapping[int, Mapping[str, nn.Module]]
    sequences: list[SequenceBatch]
    seed: int
    progress: Progress | None

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return sum(batch.ids.numel() for batch in self.sequences if not batch.heldout)

    def ids(self, batch: SequenceBatch) -> Tensor:
        return _on_device_of(self.model, batch.ids)

    def call(self, batch: SequenceBatch, index: int) -> BlockCall:
        return self.walk.calls(self.ids(batch))[index]

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


def _forward_stats(
    job: _Job, states: HiddenStates, gradients: Mapping[str, Moments], *, sequential: bool, asymmetric: bool
) -> Iterator[BlockStats]:
    """First block to last; hidden states of one depth are kept."""
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
    job: _Job, states: HiddenStates, place: tuple[int, int], capture: InputCapture, dense: Mapping[Slot, Tensor] | None,
    *, keep_input: bool,
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


def _dense_step(job: _Job, states: HiddenStates, place: tuple[int, int]) -> dict[Slot, Tensor]:
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


def _advance(job: _Job, states: HiddenStates, place: tuple[int, int]) -> None:
    """Replace the input of a block by its output, with the layers it has now."""
    index, number = place
    with quiet(job.model), torch.no_grad():
        call = job.call(job.sequences[number], index)
        output = job.walk.run(index, states.take(("hidden", index, number)), call)
    states.put(("hidden", index + 1, number), output)


def _forward_and_label(job: _Job, states: HiddenStates) -> None:
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


def _backward_stats(job: _Job, states: HiddenStates, index: int) -> dict[str, LayerStats]:
    """Statistics of one block, recomputed with its graph; hands the gradient to the block before."""
    layers = job.groups.get(index, {})
    captures = InputCapture(layers), InputCapture(layers)
    gradients = GradientCapture(layers)
    _backward(job, states, index, gradients, captures)
    return collect(layers, captures, gradients.moments(), job.tokens)


def _backward_gradients(job: _Job, states: HiddenStates, index: int) -> dict[str, Moments]:
    """G alone of one block; hands the gradient to the block before."""
    layers = job.groups.get(index, {})
    gradients = GradientCapture(layers)
    _backward(job, states, index, gradients, (InputCapture({}), InputCapture({})))
    return gradients.moments()


def _backward(
    job: _Job, states: HiddenStates, index: int, gradients: GradientCapture,
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
    job: _Job, states: HiddenStates, place: tuple[int, int], gradients: GradientCapture, capture: InputCapture
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


def _by_block(layers: Mapping[str, nn.Module], walk: BlockWalk) -> dict[int, dict[str, nn.Module]]:
    groups: dict[int, dict[str, nn.Module]] = {}
    for index, block in enumerate(walk.blocks):
        inside = {name: layer for name, layer in layers.items() if walk.whole or f"{name}.".startswith(f"{block}.")}
        if inside:
            groups[index] = inside
    return groups


def _check_fits(model: nn.Module, sequences: list[SequenceBatch]) -> None:
    """Raise `ModelError` for token ids or lengths that the model's configuration rules out."""
    config = getattr(model, "config", None)
    vocabulary, limit = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    largest, longest = max(int(s.ids.max()) for s in sequences), max(s.ids.shape[1] for s in sequences)
    smallest = min(int(s.ids.min()) for s in sequences)
    if smallest < 0 or (vocabulary is not None and largest >= vocabulary):
        raise ModelError(
            f"the calibration batches hold token ids {smallest} to {largest}; the model knows 0 <= id < "
            f"{vocabulary}. Use the tokenizer of this model."
        )
    if limit is not None and longest > limit:
        raise ModelError(
            f"calibration sequences of {longest} tokens are longer than the model can read "
            f"(max_position_embeddings={limit}); cut them to at most {limit} tokens."
        )


def _on_device_of(model: nn.Module, ids: Tensor) -> Tensor:
    first = next(model.parameters(), None)
    return ids if first is None else ids.to(first.device)
