"""Run laws on many cases and report the smallest one that breaks a law.

A law is a function ``(subject, case) -> None`` that calls `require`; its name is the law's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import hypothesis
from hypothesis.errors import Flaky

from tnc.errors import LawError

S = TypeVar("S")
C = TypeVar("C")
Law = Callable[[S, C], None]


class Broken(Exception):
    """A law found what it forbids; the message says what was expected and what was found."""


def require(condition: bool, message: str) -> None:
    """Raise `Broken` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise Broken(message)


def check_laws(laws: Sequence[Law[S, C]], subject: S, cases: Sequence[C]) -> tuple[str, ...]:
    """Run each law on every case, the smallest first, and return the laws' names.

    Raises:
        LawError: at the first broken law, with the first case that breaks it.
    """
    for law in laws:
        for case in cases:
            _try(law, subject, case)
    return tuple(law.__name__ for law in laws)


def search_laws(
    laws: Sequence[Law[S, C]],
    subject: S,
    cases: hypothesis.strategies.SearchStrategy[C],
    *,
    max_examples: int,
    seed: int | None,
) -> tuple[str, ...]:
    """Run each law on ``max_examples`` drawn cases and return the laws' names.

    Args:
        laws: in this order.
        subject: what the laws are about.
        cases: whose ``str`` describes a case and how to rebuild it.
        max_examples: cases a law.
        seed: of the search; ``None`` draws other cases every time.

    Raises:
        LawError: at the first broken law, with the smallest case that Hypothesis shrinks to.
    """
    for law in laws:
        _search(law, subject, cases, max_examples, seed)
    return tuple(law.__name__ for law in laws)


def _search(
    law: Law[S, C],
    subject: S,
    cases: hypothesis.strategies.SearchStrategy[C],
    max_examples: int,
    seed: int | None,
) -> None:
    failing: list[tuple[C, Exception]] = []

    def attempt(case: C) -> None:
        try:
            law(subject, case)
        except Exception as error:
            failing.append((case, error))
            raise

    try:
        _searched(attempt, cases, max_examples, seed)()
    except Flaky as error:
        raise LawError(
            f"{law.__name__}: holds or breaks by turns on one and the same case; expected one result for one "
            f"input. Seed every random choice.\n{failing[-1][0]}"
        ) from error
    except Exception as error:
        if not failing or failing[-1][1] is not error:  # raised while a case was drawn, not by the law
            raise
        raise _verdict(law, failing[-1][0], error) from _cause(error)


def _try(law: Law[S, C], subject: S, case: C) -> None:
    try:
        law(subject, case)
    except Broken as error:
        raise _verdict(law, case, error) from None
    except Exception as error:
        raise _verdict(law, case, error) from error


def _verdict(law: Law[S, C], case: C, error: Exception) -> LawError:
    if isinstance(error, Broken):
        return LawError(f"{law.__name__}: {error}\n{case}")
    return LawError(f"{law.__name__}: raised {type(error).__name__}: {error}; expected a result.\n{case}")


def _cause(error: Exception) -> Exception | None:
    return None if isinstance(error, Broken) else error


def _searched(
    attempt: Callable[[C], None],
    cases: hypothesis.strategies.SearchStrategy[C],
    max_examples: int,
    seed: int | None,
) -> Callable[[], None]:
    profile = hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.normal,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    test = profile(hypothesis.given(cases)(attempt))
    return test if seed is None else hypothesis.seed(seed)(test)
