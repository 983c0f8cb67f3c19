"""Labels sampled from a model's own logits, and the loss gradient they send into the last block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tnc.errors import NonFiniteError, all_finite
from tnc.models.blocks import BlockWalk


def loss_gradient(walk: BlockWalk, ids: Tensor, hidden: Tensor, indices: tuple[int, ...], *, seed: int) -> Tensor:
    """Gradient of the loss at the output ``hidden`` of the last block, in its dtype.

    The loss is ``-log p(label)`` summed over all tokens, a label sampled at each from the logits, in float32
    (float64 for float64 logits).

    Args:
        walk: the model.
        ids: token ids (sequences, tokens).
        hidden: (sequences, tokens, width); the logits where the model is one block.
        indices: place of each sequence among all sequences; its labels are drawn from ``(seed, index)``.
        seed: of the labels.

    Raises:
        NonFiniteError: if the logits hold NaN or Inf.

    Cost: the head forward and backward; the logits of one batch, and their gradient, in memory.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = walk.tail(ids, leaf.clone())  # (sequences, tokens, vocabulary)
        if not all_finite(logits):
            raise NonFiniteError(
                "the logits of the model hold NaN or Inf during calibration; expected finite numbers. Look for "
                f"NaN in its norm and head, or load it in float32 or bfloat16 (it runs in {logits.dtype})."
            )
        rows = zip(logits.detach(), indices, strict=True)
        labels = torch.stack([sample_labels(row, index, seed=seed) for row, index in rows])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def sample_labels(logits: Tensor, index: int, *, seed: int) -> Tensor:
    """One label per token (tokens,) from logits (tokens, vocabulary), by inverting the distribution function.

    The uniform numbers are drawn on the CPU, so that labels do not depend on the device or on the batch.
    """
    state = int(np.random.SeedSequence((seed % 2**64, index)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state % 2**63)
    uniform = torch.rand(logits.shape[0], 1, dtype=torch.float64, generator=generator).to(logits.device)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return labels.squeeze(-1).clamp_max(logits.shape[-1] - 1)
