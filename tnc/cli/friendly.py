"""Errors of the library as one message on standard error, with the exit status that scripts look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import typer

from tnc.cli import console
from tnc.errors import TNCError

F = TypeVar("F", bound=Callable[..., Any])


def friendly(command: F) -> F:
    """Turn the library's errors into one message on standard error and exit status 2; Ctrl-C into 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return command(*args, **kwargs)
        except TNCError as error:
            console.error(f"{type(error).__name__}: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            console.error("interrupted; nothing was written under the final name.")
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]
