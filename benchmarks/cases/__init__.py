"""The timed cases; importing this package registers them."""

from benchmarks.cases import (
    compensate,
    composed,
    cross,
    forward,
    hadamard,
    mpo,
    plan,
    qlr_cpu,
    siblings,
    trellis,
    trellis_cpu,
)

__all__ = [
    "compensate",
    "composed",
    "cross",
    "forward",
    "hadamard",
    "mpo",
    "plan",
    "qlr_cpu",
    "siblings",
    "trellis",
    "trellis_cpu",
]
