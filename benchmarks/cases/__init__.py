"""The timed cases; importing this package registers them."""

from benchmarks.cases import compensate, forward, mpo, plan

__all__ = ["compensate", "forward", "mpo", "plan"]
