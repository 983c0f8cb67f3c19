"""The timed cases; importing this package registers them."""

from benchmarks.cases import compensate, forward, mpo

__all__ = ["compensate", "forward", "mpo"]
