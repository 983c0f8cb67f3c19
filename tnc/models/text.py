"""Text to tokens: reading files, cutting windows to evaluate, drawing batches to calibrate.

A text is tokenized whole, without a BOS token, and cut into windows of ``context`` tokens that do not
overlap.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tnc.errors import TextError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Token ids under ``"input_ids"``."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Names of the tokens."""

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens outside the trained vocabulary, whose names are plain text."""


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """A tokenized text as windows that do not overlap; iterates over 1-D LongTensors.

    Attributes:
        tokens: (tokens,) int64, the windows one after another.
        byte_lengths: (tokens,) int64, UTF-8 bytes that each token stands for.
        context: tokens in a window; the last one may be shorter, never below 2.
    """

    tokens: Tensor
    byte_lengths: Tensor
    context: int

    def __len__(self) -> int:
        return -(-self.tokens.numel() // self.context)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.split(self.tokens, self.context))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as LF; ``.xz`` files are decompressed.

    Raises:
        TextError: if the file is missing, empty, not UTF-8, or a damaged ``.xz``.
    """
    path = Path(path)
    if not path.is_file():
        raise TextError(f"text file {path} does not exist; expected a UTF-8 file, book.txt or book.txt.xz.")
    try:
        text = _decompressed(path) if path.suffix == ".xz" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"text file {path} is not UTF-8 ({error}); convert it with iconv.") from error
    except (lzma.LZMAError, EOFError) as error:
        raise TextError(f"text file {path} is not a whole xz file ({error}); copy it again.") from error
    if not text:
        raise TextError(f"text file {path} is empty; expected text of at least one window of tokens.")
    return text


def _decompressed(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return str(file.read())


def token_windows(tokenizer: Tokenizer, text: str, context: int, *, keep_last: bool = True) -> TokenWindows:
    """Windows of ``context`` tokens for `tnc.models.evaluate.evaluate`.

    Args:
        tokenizer: Hugging Face tokenizer.
        text: tokenized whole, no BOS.
        context: tokens in a window, at least 2 (the first token of a window is never predicted).
        keep_last: keep the shorter last window; one of a single token, which predicts nothing, is left out.

    Raises:
        TextError: if ``context < 2``, or the text has no window: fewer tokens than ``context`` (than 2 when
            ``keep_last``).
    """
    tokens = _encode(tokenizer, text)
    shortest = 2 if keep_last else context
    _check_length(tokens, context, shortest, text)
    rest = tokens.numel() % context
    tokens = tokens[: tokens.numel() - rest] if rest < shortest else tokens
    return TokenWindows(tokens, _byte_lengths(tokenizer, tokens), context)


def calibration_batches(
    tokenizer: Tokenizer, text: str, *, context: int, sequences: int | None = None, batch_size: int = 8,
    seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Batches (at most ``batch_size``, context) int64 of full windows, in the order of the text.

    Args:
        tokenizer: Hugging Face tokenizer.
        text: tokenized whole, no BOS.
        context: tokens in a sequence, at least 2.
        sequences: number of windows; the text is cut into so many equal stretches and one window is drawn
            from each, so they are spread evenly and still random. ``None`` takes every full window.
        batch_size: sequences in a batch.
        seed: seed of the draw.

    Raises:
        TextError: if the text has fewer full windows than asked, or none.
    """
    windows = full_windows(tokenizer, text, context=context)
    if sequences is None:
        return list(torch.split(windows, batch_size))
    return list(torch.split(sample_windows(windows, sequences, seed=seed), batch_size))


def full_windows(tokenizer: Tokenizer, text: str, *, context: int) -> Tensor:
    """(windows, context) int64: the text cut into full windows, what is left over dropped.

    Raises:
        TextError: if the text has no full window, or the context leaves nothing to predict.
    """
    tokens = _encode(tokenizer, text)
    _check_length(tokens, context, context, text)
    return tokens[: tokens.numel() // context * context].view(-1, context)


def sample_windows(windows: Tensor, sequences: int, *, seed: int = 0) -> Tensor:
    """(sequences, context) of (windows, context): one drawn from each of as many equal stretches, in order.

    Raises:
        TextError: if there are fewer windows than asked, or none is asked.
    """
    count, context = windows.shape
    if not 1 <= sequences <= count:
        raise TextError(
            f"{sequences} calibration sequences of {context} tokens asked from a text which has {count} full windows; "
            f"use 1 <= sequences <= {count}, a longer text or a smaller context."
        )
    return windows[_stratified(count, sequences, seed)]


def _stratified(population: int, count: int, seed: int) -> Tensor:
    """One index from each of ``count`` nearly equal stretches of ``range(population)``, ascending."""
    starts = torch.arange(count + 1) * population // count
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return starts[:-1] + (draw * starts.diff()).long()


def _encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """(tokens,) int64; ``verbose=False`` keeps the tokenizer quiet about texts longer than its context."""
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoding["input_ids"], dtype=torch.int64)


def _check_length(tokens: Tensor, context: int, shortest: int, text: str) -> None:
    if context < 2:
        raise TextError(f"context={context} tokens leaves nothing to predict; use a context of at least 2.")
    if tokens.numel() < shortest:
        raise TextError(
            f"the text has {tokens.numel()} tokens ({len(text)} characters), shorter than one window of "
            f"{shortest} tokens; use a text of at least {shortest} tokens or a smaller context."
        )


def _byte_lengths(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """UTF-8 bytes of each token.

    Exact for byte-level BPE (each character of a token's name is one byte) and for SentencePiece names (``▁``
    is a space, ``<0x0A>`` a byte). An unknown token counts as 1 byte, the least it can stand for.
    """
    ids, places = torch.unique(tokens, return_inverse=True)
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    byte_level, added = _is_byte_level(tokenizer), tokenizer.get_added_vocab()
    unknown = getattr(tokenizer, "unk_token", None)
    lengths = [1 if n == unknown else _name_bytes(n, byte_level and n not in added) for n in names]
    return torch.tensor(lengths, dtype=torch.int64)[places]


def _name_bytes(name: str, byte_level: bool) -> int:
    if byte_level:
        return len(name)
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return 1
    return len(name.replace("▁", " ").encode())


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")  # Python tokenizers of the GPT-2 family
    return '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
