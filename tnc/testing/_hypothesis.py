"""The one place that says what to do where Hypothesis is not installed."""

from __future__ import annotations

import importlib.util

from tnc.errors import TNCError


class MissingHypothesisError(TNCError, ImportError):
    """`tnc.testing` was imported without the package it is built on."""


def require_hypothesis() -> None:
    """Raise `MissingHypothesisError` unless Hypothesis can be imported."""
    try:
        found = importlib.util.find_spec("hypothesis") is not None
    except ValueError:  # an entry of sys.modules without a spec, as where an import is blocked
        found = False
    if not found:
        raise MissingHypothesisError(
            "tnc.testing needs the package hypothesis, which is not installed; it comes with the test extra: "
            'pip install "tnc[test]".'
        )
