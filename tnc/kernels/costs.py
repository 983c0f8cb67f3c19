"""A few measured constants of a device, and the time they predict for matrix products and for moving data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Costs:
    """Seconds of elementary work.

    Attributes:
        call: one operation launched.
        item: one matrix of a batched product.
        flop: one operation of a large product.
        narrow: size of the smallest side of a product at which it runs at half speed.
        vector: how much slower an operation of a matrix times a vector is, its matrix in the cache.
        read: one byte of an operand beyond ``shared``, read in order.
        write: one byte of a result beyond ``cache``.
        fresh: one byte of a result beyond ``heap``, whose memory the system hands out and clears each time.
        permute: one byte of a permuted copy beyond ``cache``.
        cache: bytes within which intermediates are read and written for nothing.
        shared: bytes of a block that is written and read again without going to memory.
        heap: bytes up to which the memory of a result is used again.
        itemsize: bytes of an entry.
    """

    call: float
    item: float
    flop: float
    narrow: float
    vector: float
    read: float
    write: float
    fresh: float
    permute: float
    cache: float
    shared: float
    heap: float
    itemsize: int = 4

    def product(self, rows: int, inner: int, columns: int, count: int) -> float:
        """``count`` products (rows, inner) x (inner, columns), arithmetic alone."""
        smallest = max(min(rows, inner, columns), 1)
        slowed = 1 + self.narrow / smallest if smallest > 1 else self.vector
        return self.call + count * self.item + 2.0 * rows * inner * columns * count * self.flop * slowed

    def moved(self, *entries: int) -> float:
        """Operands read and, the last, a result written, where they do not fit the caches."""
        *operands, result = (size * self.itemsize for size in entries)
        return sum(size * self.read for size in operands if size > self.shared) + self._made(result)

    def permuted(self, entries: int) -> float:
        """A permuted copy of so many entries."""
        size = entries * self.itemsize
        return self.call + size * self.permute + self._made(size)

    def checked(self, entries: int) -> float:
        """So many entries read to see whether they are the same as before."""
        return self.call + entries * self.itemsize * self.read

    def _made(self, size: int) -> float:
        return size * (self.fresh if size > self.heap else self.write if size > self.cache else 0.0)


# cpu: one thread of an AMD EPYC (Zen 5, AVX-512), torch 2.13; products scale with the threads.
# cuda: an H100-class GPU: launch gaps of 4.4 us and about 230 TFLOP/s in the products of a two-core sweep.
_COSTS = {
    "cpu": Costs(
        call=2e-6, item=1e-7, flop=9.6e-12, narrow=4.5, vector=3.2, read=4e-11, write=2.5e-11, fresh=4.2e-10,
        permute=1e-10, cache=2**20, shared=2**23, heap=2**25,
    ),
    "cuda": Costs(
        call=4.4e-6, item=2e-9, flop=4.3e-15, narrow=16.0, vector=1.0, read=3e-13, write=4e-13, fresh=4e-13,
        permute=6e-13, cache=2**24, shared=2**24, heap=2**40,
    ),
}  # fmt: skip
# How much longer a product takes than in float32 (in bfloat16 on cuda).
_SLOWER = {("cpu", torch.float64): 2.0, ("cpu", torch.bfloat16): 1.5, ("cpu", torch.float16): 4.0,
           ("cuda", torch.float32): 10.0, ("cuda", torch.float64): 10.0}  # fmt: skip


def costs_of(device: torch.device, dtype: torch.dtype) -> Costs:
    """The constants for a device and a dtype; devices without any take those of ``cuda``."""
    kind = device.type if device.type in _COSTS else "cpu" if device.type == "meta" else "cuda"
    base = _COSTS[kind]
    threads = max(torch.get_num_threads(), 1) if kind == "cpu" else 1
    slower = _SLOWER.get((kind, dtype), 1.0) / threads
    return replace(base, flop=base.flop * slower, itemsize=dtype.itemsize)
