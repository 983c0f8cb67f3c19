"""The timed cases; importing this package registers them."""

from benchmarks.cases import compensate, forward, hadamard, mpo, plan, qlr_cpu

__all__ = ["compensate", "forward", "hadamard", "mpo", "plan", "qlr_cpu"]
