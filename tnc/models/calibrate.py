"""Calibration: the statistics of every linear layer of a model, one block at a time.

H needs one forward pass. G needs one backward pass as well; activations are recomputed block by block, so
that at any time the graph and the statistics of one block are alive, beside the hidden states between blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from tnc.errors import StatsError
from tnc.models.backward_pass import backward_gradients, backward_stats, forward_and_label
from tnc.models.calibration_job import Progress, calibration_job
from tnc.models.forward_pass import forward_stats
from tnc.models.hidden_states import HiddenStates
from tnc.models.layers import select_layers
from tnc.models.sequences import Batch, read_sequences
from tnc.stats import LayerStats, Moments

__all__ = ["Batch", "calibrate", "iter_block_stats"]

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
    job = calibration_job(model, layers, sequences, seed=seed, progress=progress)
    with HiddenStates(memory_limit_bytes) as states:
        if not fisher:
            yield from forward_stats(job, states, {}, sequential=sequential, asymmetric=asymmetric)
            return
        forward_and_label(job, states)
        backwards = range(len(job.walk.blocks) - 1, min(job.groups) - 1, -1)
        if sequential:
            gradients: dict[str, Moments] = {}
            for index in backwards:
                gradients.update(backward_gradients(job, states, index))
            yield from forward_stats(job, states, gradients, sequential=True, asymmetric=asymmetric)
            return
        for index in backwards:
            group = backward_stats(job, states, index)
            if group:
                yield index, group
            del group
