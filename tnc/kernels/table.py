"""The kernel table: which implementations exist, and which one runs an expression.

A kernel is chosen and bound once, when a module is built or moved, never per call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tnc.errors import BackendError
from tnc.terms import Expression, Spec

Tensors = Mapping[str, Tensor]


class Bound(Protocol):
    """A kernel prepared for one expression: everything but the tensors is fixed."""

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """``x @ W.T`` in the dtype of ``x``: (..., in_features) to (..., out_features).

        ``tensors`` has the names of `Expression.tensors`. ``x`` may have any floating dtype, also another
        than the one the kernel was chosen for.
        """

    def describe(self) -> str:
        """One line for `tnc.FactoredLinear.explain`: what runs, and when."""


@runtime_checkable
class Repacking(Bound, Protocol):
    """A bound kernel that reads tensors in a layout of its own.

    Whoever holds the tensors keeps what `pack` returns *in the place of* the operator's, calls the kernel with it,
    and gets the operator's tensors back by `unpack`: nothing is held twice.
    """

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors in the kernel's layout; those that it reads as they are keep their name and identity."""

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """Inverse of `pack`, bit for bit."""


@runtime_checkable
class Timed(Bound, Protocol):
    """A bound kernel that predicts its time from measured ones."""

    def microseconds(self, tokens: int, device: torch.device) -> float | None:
        """For so many tokens, cold weights; ``None`` where nothing like it was measured."""


@runtime_checkable
class Changing(Bound, Protocol):
    """A bound kernel that can take transforms of x, each a (spec, tensors), into its launch."""

    def takes(self, specs: Sequence[Spec]) -> int:
        """How many of the last of these transforms, the first to meet x first."""

    def most(self, specs: Sequence[Spec]) -> int:
        """Tokens up to which it makes such transforms in its launch; for more they run before."""

    def changed(self, x: Tensor, transforms: Sequence[tuple[Spec, Tensors]], tensors: Tensors) -> Tensor:
        """The answer to the transformed x: (tokens, in_features) to (tokens, out_features), for any tokens."""

    def changing(self, specs: Sequence[Spec], tokens: int, device: torch.device) -> float | None:
        """Predicted microseconds that these transforms add to its launch; ``None`` where they run before."""


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: the ``backend`` that names it; lower case.
        serves: (operator, device, dtype of x) to ``None``, or to the reason why this kernel cannot run it.
            It looks at the structure and the shapes only, never at values: tensors may be on ``meta``.
        bind: prepares the kernel for an operator; the result keeps no tensor. If it is `Repacking`, it is called
            with the tensors that its ``pack`` returns.
        priority: ``backend="auto"`` takes the highest that serves.
        delegates: ``bind`` takes device and dtype too, because it gives parts of the operator to other rows.
    """

    name: str
    serves: Callable[[Expression, torch.device, torch.dtype], str | None]
    bind: Callable[..., Bound]
    priority: int
    delegates: bool = False


@dataclass(frozen=True)
class Candidate:
    """What became of one row: its name, whether it was chosen, and why or why not."""

    name: str
    chosen: bool
    reason: str


_KERNELS: dict[str, Kernel] = {}


def register_kernel(kernel: Kernel) -> Kernel:
    """Add a row to the table.

    Raises:
        BackendError: if the name is taken or reserved, or is not lower case.
    """
    name = kernel.name
    if name != _normalise(name) or name == "auto" or name in _KERNELS:
        raise BackendError(
            f"register_kernel(name={name!r}) is taken, reserved or not lower case; expected a new name "
            f"besides {', '.join(backends())}."
        )
    _KERNELS[name] = kernel
    return kernel


def backends() -> tuple[str, ...]:
    """Every valid ``backend``: ``"auto"``, then the registered kernels by name."""
    return ("auto", *sorted(_KERNELS))


def choose(
    operator: Expression, device: torch.device, dtype: torch.dtype, *, backend: str = "auto"
) -> tuple[Bound, tuple[Candidate, ...]]:
    """The kernel that will run ``operator``, bound to it, and what became of every row of the table.

    ``"auto"`` takes the serving kernel of the highest priority, on a tie the first by name; a named backend
    takes that kernel. Nothing is timed, so the same table gives the same choice everywhere.

    Args:
        operator: the expression; its tensors are looked at for shapes only.
        device: where the tensors lie.
        dtype: dtype expected of ``x``.
        backend: one of `backends`.

    Returns:
        The bound kernel, and a `Candidate` for each row, highest priority first.

    Raises:
        BackendError: if the backend is unknown, or named and unable to serve (with its reason).
    """
    wanted = _normalise(backend)
    if wanted not in backends():
        raise BackendError(f"unknown backend {backend!r}; expected one of {', '.join(backends())}.")
    rows = _rows()
    refusals = {row.name: row.serves(operator, device, dtype) for row in rows}
    chosen = _pick(rows, refusals, wanted)
    report = tuple(_candidate(row, chosen, refusals[row.name], wanted) for row in rows)
    return bound_by(chosen.name, operator, device, dtype), report


def row_of(operator: Expression, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel that `choose` takes by itself; nothing is bound."""
    return next(row.name for row in _rows() if row.serves(operator, device, dtype) is None)


def bound_by(name: str, operator: Expression, device: torch.device, dtype: torch.dtype) -> Bound:
    """The kernel of that name bound to an operator that it serves."""
    row = _KERNELS[name]
    return row.bind(operator, device, dtype) if row.delegates else row.bind(operator)


def refusal_of(name: str, operator: Expression, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel of that name cannot serve an operator, or ``None``."""
    return _KERNELS[name].serves(operator, device, dtype)


def _rows() -> list[Kernel]:
    """The table in the order of choice."""
    return sorted(_KERNELS.values(), key=lambda row: (-row.priority, row.name))


def _pick(rows: list[Kernel], refusals: dict[str, str | None], wanted: str) -> Kernel:
    serving = [row for row in rows if refusals[row.name] is None]
    if wanted == "auto":
        assert serving, "the reference kernel serves everything"
        return serving[0]
    named = [row for row in serving if row.name == wanted]
    if not named:
        raise BackendError(
            f"backend {wanted!r} cannot serve this operator: {refusals[wanted]}. "
            f'Use backend="auto" or one of {", ".join(row.name for row in serving)}.'
        )
    return named[0]


def _candidate(row: Kernel, chosen: Kernel, refusal: str | None, wanted: str) -> Candidate:
    if row is chosen:
        return Candidate(row.name, True, "named by the caller" if wanted != "auto" else "highest priority")
    if refusal is not None:
        return Candidate(row.name, False, refusal)
    if wanted != "auto":
        return Candidate(row.name, False, f"the caller named {chosen.name}")
    return Candidate(row.name, False, f"{chosen.name} comes first (priority {chosen.priority} over {row.priority})")


def _normalise(name: str) -> str:
    return name.strip().lower()
