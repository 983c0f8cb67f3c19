"""Exchange with TensorLy and quimb: plain arrays in, plain arrays out; neither package is needed.

- TensorLy's ``TTMatrix`` keeps the layout of `Mpo`: factors (r_prev, out, in, r_next).
- quimb's ``MatrixProductOperator`` takes arrays (left, right, up, down) by default, without the outer bond at
  both ends; "up" is the output leg.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from tnc.errors import ShapeError
from tnc.terms import Mpo


def to_tensorly(mpo: Mpo) -> list[Tensor]:
    """Copies of the cores as the factors of ``tensorly.tt_matrix.TTMatrix(to_tensorly(mpo))``; padding stays."""
    return [core.detach().clone() for core in mpo.cores]


def from_tensorly(factors: Iterable[Any], *, features: tuple[int, int] | None = None) -> Mpo:
    """An `Mpo` of TensorLy's factors (r_prev, out, in, r_next): a ``TTMatrix`` or any sequence of arrays; copied.

    Raises:
        ShapeError: if the arrays do not make a chain.
    """
    return Mpo(tuple(_tensor(factor) for factor in factors), features)


def to_quimb_arrays(mpo: Mpo, *, shape: str = "lrud") -> list[Tensor]:
    """Copies of the cores as ``quimb.tensor.MatrixProductOperator(arrays, shape=shape)`` takes them.

    Args:
        mpo: d >= 2 cores.
        shape: order of the legs left, right, up (output) and down (input).

    Raises:
        ShapeError: if ``shape`` is not an order of the letters ``lrud``.
    """
    order = _legs(shape)
    arrays = []
    for k, core in enumerate(mpo.cores):
        missing = ("l" if k == 0 else "") + ("r" if k == len(mpo.cores) - 1 else "")
        legs = [leg for leg in order if leg not in missing]
        kept = core.detach().reshape([size for leg, size in zip("ludr", core.shape, strict=True) if leg not in missing])
        present = [leg for leg in "ludr" if leg not in missing]
        arrays.append(kept.permute([present.index(leg) for leg in legs]).clone(memory_format=torch.contiguous_format))
    return arrays


def from_quimb_arrays(arrays: Sequence[Any], *, shape: str = "lrud", features: tuple[int, int] | None = None) -> Mpo:
    """An `Mpo` of the arrays of an open quimb ``MatrixProductOperator`` (``mpo.arrays``); copied.

    Raises:
        ShapeError: if ``shape`` is not an order of the letters ``lrud``, or an array has other legs.
    """
    order = _legs(shape)
    cores = []
    for k, array in enumerate(arrays):
        missing = ("l" if k == 0 else "") + ("r" if k == len(arrays) - 1 else "")
        legs = [leg for leg in order if leg not in missing]
        tensor = _tensor(array)
        if tensor.ndim != len(legs):
            raise ShapeError(
                f"array {k} has shape {tuple(tensor.shape)}; expected the legs {''.join(legs)} of an open "
                "matrix product operator."
            )
        tensor = tensor.permute([legs.index(leg) for leg in "ludr" if leg in legs])
        tensor = tensor.unsqueeze(0) if "l" in missing else tensor
        cores.append((tensor.unsqueeze(-1) if "r" in missing else tensor).contiguous())
    return Mpo(tuple(cores), features)


def _legs(shape: str) -> str:
    if sorted(shape) != sorted("lrud"):
        raise ShapeError(f"shape={shape!r}; expected an order of the letters 'lrud'.")
    return shape


def _tensor(array: Any) -> Tensor:  # noqa: ANN401
    return array.detach().clone() if isinstance(array, Tensor) else torch.from_numpy(numpy.array(array))
