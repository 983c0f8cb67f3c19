"""The rebuilt weights that a process keeps on CPU between calls: one, unless the user gives room for more."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.errors import BudgetError
from tnc.kernels.fingerprint import fingerprint

_BETTER = 1.25  # times the gain of the weights that make way for another


@dataclass
class _Kept:
    """A weight, whose it is, the fingerprint of what it was made of, and the most that a call gained by it."""

    owner: weakref.ref[Tensor]
    fingerprint: Tensor
    weight: Tensor
    gain: float

    @property
    def bytes(self) -> int:
        return self.weight.numel() * self.weight.itemsize


class KeptWeights:
    """Room for weights, given first to the operators that ask first, then to those that gain the most by it.

    A weight makes way for another whose calls are predicted to gain at least 1.25 times as many seconds, never for one
    of equal gain: a model whose layers are all alike keeps those that were called first, and rebuilds nothing twice. A
    weight is used again only while the tensors it was made of have the same `fingerprint`, so that an edit in place is
    seen however it was done: torch counts versions, but not those of edits through ``.data``. It goes when they go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []
        self.allow()

    def allow(self, *, weights: int | None = 1, nbytes: int = 2**28) -> None:
        """Say how much is kept from now on; what is kept already goes.

        Args:
            weights: most weights; ``None`` is as many as fit. 0 keeps none.
            nbytes: most bytes of all of them together.

        Raises:
            BudgetError: for negative numbers.
        """
        if nbytes < 0 or (weights is not None and weights < 0):
            raise BudgetError(f"KEPT.allow(weights={weights}, nbytes={nbytes}); expected no negative number.")
        with self._lock:
            self._weights, self._bytes, self._kept = weights, nbytes, []

    def weight(
        self, factors: Sequence[Tensor], dtype: torch.dtype, build: Callable[[], Tensor], *, nbytes: int, gain: float
    ) -> Tensor | None:
        """The weight of ``factors`` in ``dtype``, built where it is new or outdated; ``None`` where it has no room.

        Args:
            factors: CPU tensors; the first one stands for the operator.
            dtype: of the weight.
            build: makes it.
            nbytes: of the weight.
            gain: seconds that a call is predicted to gain by it.
        """
        with self._lock:
            self._kept = [each for each in self._kept if _lives(each)]
            found = fingerprint(factors) if self._held(factors) else None
            for each in self._held(factors):
                if found is not None and each.weight.dtype == dtype and torch.equal(each.fingerprint, found):
                    each.gain = max(each.gain, gain)
                    return each.weight
                self._kept.remove(each)  # the old weight goes before the new one comes
            if not self._make_room(nbytes, gain):
                return None
            with torch.no_grad():
                weight = build()
            found = fingerprint(factors) if found is None else found
            self._kept.append(_Kept(weakref.ref(factors[0]), found, weight, gain))
            return weight

    def release(self) -> None:
        """Forget the weights; the room for them stays."""
        with self._lock:
            self._kept = []

    def _held(self, factors: Sequence[Tensor]) -> list[_Kept]:
        return [each for each in self._kept if each.owner() is factors[0]]

    def _make_room(self, nbytes: int, gain: float) -> bool:
        """Whether a weight has room, after those of least gain have made way where that is better."""
        rest = sorted(self._kept, key=lambda each: each.gain)
        lost = 0.0
        while not self._fits(rest, nbytes):
            if not rest or gain < _BETTER * (lost := lost + rest[0].gain):
                return False
            rest = rest[1:]
        self._kept = rest
        return True

    def _fits(self, kept: Sequence[_Kept], nbytes: int) -> bool:
        room = sum(each.bytes for each in kept) + nbytes <= self._bytes
        return room and (self._weights is None or len(kept) < self._weights)


KEPT = KeptWeights()
"""Those of this process."""


def _lives(kept: _Kept) -> bool:
    owner = kept.owner()
    return owner is not None and owner.device.type == "cpu"
