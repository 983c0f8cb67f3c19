"""The timed cases; importing this package registers them."""

from benchmarks.cases import compensate, forward, plan

__all__ = ["compensate", "forward", "plan"]
