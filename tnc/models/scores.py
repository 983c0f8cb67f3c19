"""Token scores from logits, and their means with standard errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

# Logits turned into float64 log-probabilities at a time (32 MB each for model and reference).
_CHUNK = 1 << 22


def token_scores(logits: Tensor, tokens: Tensor, dense: Tensor | None) -> dict[str, Tensor]:
    """Sums over each window of the scores of its tokens but the first.

    Args:
        logits: (windows, tokens, vocabulary), any float dtype; position t predicts token t + 1.
        tokens: (windows, tokens) int64.
        dense: logits of the reference, or ``None``.

    Returns:
        (windows,) float64 on the CPU for ``tokens`` (how many), ``nats`` (``-log p``) and, with a reference,
        ``kl`` (``KL(dense || model)``), ``delta`` (nats minus those of the reference) and ``agreement`` (1
        where both rank the same token first).

    Cost: float64 log-softmax in chunks of rows; memory does not grow with the number of tokens.
    """
    labels = tokens[:, 1:].to(logits.device).reshape(-1)
    rows = max(1, _CHUNK // logits.shape[-1])
    chunks = [_chunks(logits, rows), torch.split(labels, rows)]
    if dense is not None:
        chunks.append(_chunks(dense.to(logits.device), rows))
    parts = [_scores(*chunk) for chunk in zip(*chunks, strict=True)]
    return {key: torch.cat([p[key] for p in parts]).view(len(tokens), -1).sum(1).cpu() for key in parts[0]}


def _chunks(logits: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Predictions of all tokens but each window's first, (rows, vocabulary) at a time."""
    return torch.split(logits[:, :-1].flatten(0, 1), rows)


def _scores(logits: Tensor, labels: Tensor, dense: Tensor | None = None) -> dict[str, Tensor]:
    log_q = log_softmax(logits.double(), -1)  # (rows, vocabulary)
    nats = -log_q.gather(1, labels[:, None])[:, 0]
    scores = {"tokens": torch.ones_like(nats), "nats": nats}
    if dense is None:
        return scores
    log_p = log_softmax(dense.double(), -1)
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, also where a token is ruled out (-inf)
    agreement = (logits.argmax(-1) == dense.argmax(-1)).double()
    delta = nats + log_p.gather(1, labels[:, None])[:, 0]
    return {**scores, "kl": terms.sum(-1), "delta": delta, "agreement": agreement}


class Tally:
    """Window sums of scores, gathered batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, scores: dict[str, Tensor]) -> None:
        """Add the window sums of a batch."""
        for key, values in scores.items():
            self._sums.setdefault(key, []).append(values)

    def has(self, key: str) -> bool:
        """Whether the score was gathered."""
        return key in self._sums

    @property
    def tokens(self) -> int:
        """Scored tokens so far."""
        return round(float(torch.cat(self._sums["tokens"]).sum()))

    def mean(self, key: str) -> tuple[float, float | None]:
        """Mean per token and its standard error.

        With window sums ``s_w`` of ``n_w`` tokens, ``mean = Σ s_w / Σ n_w`` and
        ``error² = W / (W - 1) Σ (s_w - mean n_w)² / (Σ n_w)²``: windows are the sampling units, since tokens
        of one window are correlated. ``None`` for a single window.

        Source: linearised ratio estimator, Cochran, Sampling Techniques, 3rd ed., eq. 6.10.
        """
        sums, counts = torch.cat(self._sums[key]), torch.cat(self._sums["tokens"])
        mean, windows = float(sums.sum() / counts.sum()), len(sums)
        if windows < 2:
            return mean, None
        squares = float((sums - mean * counts).square().sum())
        return mean, math.sqrt(windows / (windows - 1) * squares) / float(counts.sum())
