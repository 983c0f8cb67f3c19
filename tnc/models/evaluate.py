"""What a compressed model is worth on text: perplexity, bits per byte, KL to the dense model, size.

Protocol: windows of ``context`` tokens that do not overlap, the shorter last one kept, the first token of
each window not scored. Perplexity is ``exp`` of the mean nats per scored token; bits per byte are
``nats / ln 2 / UTF-8 bytes`` of the scored tokens. The model runs in its own dtype; probabilities and sums
are taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tnc.errors import ModelError, NonFiniteError, TextError
from tnc.models.scores import Tally, token_scores
from tnc.models.text import TokenWindows
from tnc.modules import FactoredLinear
from tnc.ties import distinct_bits

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one text; everything per scored token.

    Standard errors take windows as the independent units (tokens of one window are not), by the linearised
    ratio estimator; ``None`` with fewer than two windows.

    Attributes:
        tokens: scored tokens.
        nats: mean ``-log p`` of the true token, in nats.
        nats_error: standard error of ``nats``.
        perplexity: ``exp(nats)``.
        bits_per_byte: bits over UTF-8 bytes of the scored tokens; ``None`` where byte lengths are unknown.
        kl: mean KL(dense || model) in nats; ``None`` without reference, as all below.
        kl_error: standard error of ``kl``.
        top1_agreement: share of tokens where both models rank the same token first.
        delta_nats: mean nats of the model minus mean nats of the dense model on the same tokens.
        delta_nats_error: its standard error, paired: of the difference, not of the two.
    """

    tokens: int
    nats: float
    nats_error: float | None
    perplexity: float
    bits_per_byte: float | None
    kl: float | None = None
    kl_error: float | None = None
    top1_agreement: float | None = None
    delta_nats: float | None = None
    delta_nats_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def evaluate(
    model: nn.Module, windows: TokenWindows | Iterable[Tensor], *, reference: nn.Module | None = None,
    batch_size: int = 4, progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Scores of one model; `evaluate_many` for several models against one reference.

    Args:
        model: returns logits (batch, tokens, vocabulary), or an object with ``.logits``, for token ids.
        windows: from `tnc.models.text.token_windows`, or 1-D LongTensors (then without bits per byte).
        reference: the dense model, for KL, agreement and paired difference.
        batch_size: windows in a forward pass.
        progress: called with ("evaluate", windows done, windows in all).

    Raises:
        TextError: if no window has two tokens.
        ModelError: if the windows hold tokens the model does not have, or are longer than it can read.
        NonFiniteError: if the logits give no finite loss.
    """
    results = evaluate_many({"model": model}, windows, reference=reference, batch_size=batch_size, progress=progress)
    return results["model"]


def evaluate_many(
    models: Mapping[str, nn.Module], windows: TokenWindows | Iterable[Tensor], *,
    reference: nn.Module | None = None, batch_size: int = 4, progress: Progress | None = None,
) -> dict[str, Evaluation]:  # fmt: skip
    """Scores of several models in one pass: the reference runs once a batch. Arguments as `evaluate`."""
    texts = [window for window in windows if window.numel() > 1]
    if not texts:
        raise TextError("no window of at least 2 tokens to score; pass windows of token_windows(...).")
    everyone = {**models, **({} if reference is None else {"reference": reference})}
    for name, model in everyone.items():
        _check_fits(name, model, texts)
    tallies = {name: Tally() for name in models}
    done = 0
    with torch.no_grad(), ExitStack() as stack:
        for model in everyone.values():
            stack.enter_context(_eval_mode(model))
        for batch in _batches(texts, batch_size):  # (windows, tokens)
            dense = None if reference is None else _logits(reference, batch)
            for name, model in models.items():
                tallies[name].add(token_scores(_logits(model, batch), batch, dense))
            done += len(batch)
            if progress is not None:
                progress("evaluate", done, len(texts))
    scored_bytes = _scored_bytes(windows) if isinstance(windows, TokenWindows) else None
    return {name: _summary(name, tally, scored_bytes) for name, tally in tallies.items()}


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def bits_per_weight(model: nn.Module) -> float | None:
    """Stored bits of all `FactoredLinear` layers over their dense element count; ``None`` without any."""
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    elements = sum(layer.out_features * layer.in_features for layer in layers)
    return distinct_bits(layers) / elements if elements else None


def _batches(texts: list[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Neighbouring windows of one length, stacked: no padding, so no attention mask is needed."""
    for _, group in groupby(texts, key=Tensor.numel):
        yield from torch.split(torch.stack(list(group)), batch_size)


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    """(windows, tokens, vocabulary); the token ids go to the model's device."""
    first = next(model.parameters(), None)
    tokens = batch if first is None else batch.to(first.device)
    config = getattr(model, "config", None)
    output = model(tokens, use_cache=False) if hasattr(config, "use_cache") else model(tokens)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _check_fits(name: str, model: nn.Module, texts: list[Tensor]) -> None:
    config = getattr(model, "config", None)
    limit, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    longest, largest = max(text.numel() for text in texts), max(int(text.max()) for text in texts)
    if limit is not None and longest > limit:
        raise ModelError(
            f"windows of {longest} tokens are longer than {name} can read (max_position_embeddings={limit}); "
            f"cut the text with a context of at most {limit} tokens."
        )
    if vocabulary is not None and largest >= vocabulary:
        raise ModelError(
            f"the windows hold token id {largest}; {name} knows ids below {vocabulary}. Use the tokenizer of "
            "this model."
        )


def _scored_bytes(windows: TokenWindows) -> int:
    """UTF-8 bytes of all tokens but the first of each window."""
    firsts = windows.byte_lengths[:: windows.context]
    return int(windows.byte_lengths.sum() - firsts.sum())


def _summary(name: str, tally: Tally, scored_bytes: int | None) -> Evaluation:
    nats, nats_error = tally.mean("nats")
    if not math.isfinite(nats):
        raise NonFiniteError(
            f"the mean loss of {name} is {nats}; expected a finite number. Look for NaN or Inf in its "
            "weights, or load it in float32."
        )
    bits = None if not scored_bytes else nats * tally.tokens / math.log(2) / scored_bytes
    alone = Evaluation(tally.tokens, nats, nats_error, _perplexity(nats), bits)
    if not tally.has("kl"):
        return alone
    (kl, kl_error), (delta, delta_error) = tally.mean("kl"), tally.mean("delta")
    return replace(
        alone, kl=kl, kl_error=kl_error, top1_agreement=tally.mean("agreement")[0], delta_nats=delta,
        delta_nats_error=delta_error,
    )  # fmt: skip


def _perplexity(nats: float) -> float:
    """``exp(nats)``; infinite where float64 ends (709 nats), as a broken model can reach."""
    return math.exp(nats) if nats < 709 else math.inf


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
