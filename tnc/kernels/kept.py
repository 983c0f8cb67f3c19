"""The one rebuilt weight that a process keeps on CPU between calls."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Kept:
    """A weight, whose it is, and the fingerprints of what it was made of."""

    owner: weakref.ref[Tensor]
    fingerprints: tuple[Tensor, ...]
    weight: Tensor


class Slot:
    """Room for one weight, held by the first operator that asks until its tensors are gone.

    The weight is used again only while the tensors it was made of have the same `fingerprint`, so that an edit in
    place is seen however it was done: torch counts versions, but not those of edits through ``.data``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: _Kept | None = None

    def weight(self, factors: Sequence[Tensor], dtype: torch.dtype, build: Callable[[], Tensor]) -> Tensor | None:
        """The weight of ``factors`` in ``dtype``, built where it is new or outdated; ``None`` where another is kept.

        Args:
            factors: CPU tensors; the first one stands for the operator.
            dtype: of the weight.
            build: makes it.
        """
        with self._lock:
            owner = None if self._kept is None else self._kept.owner()
            if owner is not None and owner is not factors[0] and owner.device.type == "cpu":
                return None
            found = tuple(fingerprint(factor) for factor in factors)
            kept = self._kept if owner is factors[0] else None
            if kept is not None and kept.weight.dtype == dtype and _same(kept.fingerprints, found):
                return kept.weight
            self._kept = kept = None  # the old weight goes before the new one comes
            with torch.no_grad():
                weight = build()
            self._kept = _Kept(weakref.ref(factors[0]), found, weight)
            return weight

    def release(self) -> None:
        """Forget the weight."""
        with self._lock:
            self._kept = None


SLOT = Slot()
"""That of this process."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Sums of the bits of a tensor, by rows and by columns, as integers modulo 2^64.

    Any change of one entry changes them, and so does an exchange of entries unless it keeps every sum. Reads the
    tensor twice, the second time from the cache: 0.2 ms for 4 MB on one core.
    """
    rows = tensor.detach().reshape(-1, tensor.shape[-1] * tensor.shape[-2])
    bits = rows.shape[1] * rows.dtype.itemsize
    words = rows.view(torch.int64 if bits % 8 == 0 else _WORDS[rows.dtype.itemsize])
    return torch.cat([words.sum(0, dtype=torch.int64), words.sum(1, dtype=torch.int64)])


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
