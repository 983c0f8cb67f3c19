"""Calibration batches as sequences without padding, split into calibration and held-out ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Union

import torch
from torch import Tensor

from tnc.errors import ShapeError, StatsError, check_same_shape

Batch = Union[Tensor, Mapping[str, Tensor]]  # noqa: UP007 (evaluated at run time)
_KEYS = ("input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Sequences of one length without padding, all held out or none.

    Attributes:
        ids: token ids (sequences, tokens).
        indices: place of each sequence among all that were given.
        heldout: whether they are kept out of H and G.
    """

    ids: Tensor
    indices: tuple[int, ...]
    heldout: bool


def read_sequences(batches: Iterable[Batch], heldout_share: float) -> list[SequenceBatch]:
    """Sequences of the batches, padding removed, grouped by length within each batch.

    Masked tokens are cut out, wherever they stand, so no padding ever reaches the model. Sequence i of all
    is held out iff ``floor((i + 1) share) > floor(i share)``, whatever the batches; if that takes none and
    there are at least two, the last one is.

    Raises:
        StatsError: if no token is left, the share is outside [0, 1), or a batch holds other keys.
        ShapeError: if ids are not integers (sequences, tokens), or the mask has another shape.
    """
    if not 0 <= heldout_share < 1:
        raise StatsError(f"heldout_share={heldout_share} is outside 0 <= heldout_share < 1; 0.1 keeps out every tenth.")
    given = [_sequences(batch, number) for number, batch in enumerate(batches)]
    given = [[sequence for sequence in batch if sequence.numel()] for batch in given]
    count = sum(len(batch) for batch in given)
    if count == 0:
        raise StatsError(
            "zero calibration tokens: the batches are empty or fully masked; expected at least one token. "
            "Pass token ids (sequences, tokens), with 1 in attention_mask for the tokens to use."
        )
    heldout = heldout_sequences(count, heldout_share)
    groups: list[SequenceBatch] = []
    first = 0
    for batch in given:
        groups += _grouped(batch, first, heldout)
        first += len(batch)
    return groups


def heldout_sequences(count: int, share: float) -> frozenset[int]:
    """Which of ``count`` sequences are held out, evenly spread; never the first."""
    exact = Fraction(share).limit_denominator(10**6)  # 0.29 * 100 is below 29 in floats
    chosen = frozenset(i for i in range(count) if (i + 1) * exact // 1 > i * exact // 1)
    return frozenset({count - 1}) if not chosen and count >= 2 and share > 0 else chosen


def _grouped(sequences: list[Tensor], first: int, heldout: frozenset[int]) -> list[SequenceBatch]:
    members: dict[tuple[int, bool], list[int]] = {}
    for place, sequence in enumerate(sequences):
        members.setdefault((sequence.numel(), first + place in heldout), []).append(place)
    return [
        SequenceBatch(torch.stack([sequences[p] for p in places]), tuple(first + p for p in places), out)
        for (_, out), places in members.items()
    ]


def _sequences(batch: Batch, number: int) -> list[Tensor]:
    """The unmasked tokens of each row."""
    ids, mask = _ids_and_mask(batch, number)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        what = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ShapeError(
            f"calibration batch {number} is {what}; expected integer token ids (sequences, tokens), or a "
            "dict with input_ids and attention_mask. Pass a list of batches: calibrate(model, [ids])."
        )
    if mask is None:
        return list(ids.long())
    check_same_shape(tuple(mask.shape), tuple(ids.shape), f"attention_mask of batch {number}", "its input_ids")
    return [row[keep.bool()] for row, keep in zip(ids.long(), mask.to(ids.device), strict=True)]


def _ids_and_mask(batch: Batch, number: int) -> tuple[Tensor, Tensor | None]:
    if not isinstance(batch, Mapping):
        return batch, None
    if "input_ids" not in batch or any(key not in _KEYS for key in batch):
        raise StatsError(
            f"calibration batch {number} has keys {sorted(batch)}; expected input_ids and optionally "
            "attention_mask. Pass {key: batch[key] for key in ('input_ids', 'attention_mask')}."
        )
    return batch["input_ids"], batch.get("attention_mask")
