"""Labels sampled from a model's own logits, and the loss gradient they send into the last block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tnc.errors import NonFiniteError
from tnc.models.blocks import BlockWalk


def _tail_gradient(
    walk: BlockWalk, ids: Tensor, hidden: Tensor, indices: tuple[int, ...], seed: int
) -> Tensor:
    """Gradient of the summed loss at ``hidden``, labels sampled from the logits; dtype of ``hidden``."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = walk.tail(ids, leaf.clone())  # (sequences, tokens, vocabulary)
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                "the logits of the model hold NaN or Inf during calibration; expected finite numbers. Look "
                f"for NaN in its norm and head, or load it in float32 or bfloat16 (it runs in "
                f"{logits.dtype})."
            )
        labels = torch.stack(
            [
                sample_labels(row, index, seed=seed)
                for row, index in zip(logits.detach(), indices, strict=True)
            ]
        )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def sample_labels(logits: Tensor, index: int, *, seed: int) -> Tensor:
    """One label per token (tokens,) from logits (tokens, vocabulary), by inverting the distribution function.

    The uniform numbers are drawn on the CPU, so that labels do not depend on the device or on the batch.
    """
    state = int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state % 2**63)
    uniform = torch.rand(logits.shape[0], 1, dtype=torch.float64, generator=generator).to(logits.device)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return labels.squeeze(-1).clamp_max(logits.shape[-1] - 1)
