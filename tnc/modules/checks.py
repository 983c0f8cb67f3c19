"""What a layer refuses to be made of."""

from __future__ import annotations

from torch import Tensor

from tnc.errors import BackendError, ShapeError
from tnc.terms import Expression


def check_bias(bias: Tensor | None, operator: Expression) -> None:
    """Raise `ShapeError` unless the bias is a floating vector of the operator's rows."""
    if bias is not None and (tuple(bias.shape) != (operator.shape[0],) or not bias.is_floating_point()):
        raise ShapeError(
            f"FactoredLinear got a {bias.dtype} bias of shape {tuple(bias.shape)}; expected a floating-point "
            f"vector ({operator.shape[0]},) for an operator of shape {operator.shape}. Pass its own bias."
        )


def check_one_device(operator: Expression, bias: Tensor | None) -> None:
    """Raise `BackendError` if the tensors are on several devices."""
    stored = {**operator.tensors(), **({} if bias is None else {"bias": bias})}
    places = {name: str(tensor.device) for name, tensor in stored.items()}
    if len(set(places.values())) > 1:
        raise BackendError(
            f"FactoredLinear got tensors on several devices: {places}; expected one. "
            "Move the operator with tnc.terms.map_tensors, or the layer with .to(device)."
        )
