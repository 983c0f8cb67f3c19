"""The registry of timed cases: a case is data, the runner does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Way = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """One built instance of a case.

    Attributes:
        ways: name -> the callable that is timed; the first is the baseline of the ratios.
        errors: result of a way -> named error measures, printed beside its time.
        limit: largest accepted value of each error measure; a way above it gets no time.
        repeats: timed runs of a way after the checked one, where it is not in ``once``.
        once: ways so slow that the checked run is the timed one.
    """

    ways: Mapping[str, Way]
    errors: Callable[[Any], dict[str, float]]
    limit: Mapping[str, float]
    repeats: int = 5
    once: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """A named case and the function that builds it."""

    name: str
    summary: str
    build: Callable[[], Problem]


CASES: dict[str, Case] = {}


def case(name: str, summary: str) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Register a builder under ``name``, which can be taken once."""

    def add(build: Callable[[], Problem]) -> Callable[[], Problem]:
        if name in CASES:
            raise ValueError(f"benchmark case {name!r} is already registered.")
        CASES[name] = Case(name, summary, build)
        return build

    return add
