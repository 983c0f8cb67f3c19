"""Which layers are compressed: the linear maps inside the decoder blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tnc.errors import ModelError, check_finite


def select_layers(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """Linear layers of the decoder blocks by full name, in model order.

    Linear means ``nn.Linear`` or the ``Conv1D`` of transformers. Embeddings and the output head, tied or not,
    are left out; a weight shared by several layers appears once, under its first name.

    Args:
        model: any module; see `decoder_blocks` for what a block is.
        include: glob patterns on full names (``"*.mlp.*"``), case sensitive; ``None`` takes every layer.
        exclude: glob patterns of layers to leave out.

    Raises:
        ModelError: if the model has no linear layer, a pattern matches none, or the patterns leave none.
        NonFiniteError: if the weight of a selected layer holds NaN or Inf; names the layer.
    """
    candidates = _candidates(model)
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no nn.Linear or Conv1D layer outside its embeddings and head; "
            "expected at least one in its decoder blocks. Pass the language model itself, not a part without "
            "layers."
        )
    included = _matching(candidates, _patterns(include, "include"), "include", default=set(candidates))
    excluded = _matching(candidates, _patterns(exclude, "exclude"), "exclude", default=set())
    chosen = {name: layer for name, layer in candidates.items() if name in included - excluded}
    if not chosen:
        raise ModelError(
            f"include and exclude together leave none of {len(candidates)} layers; expected at least one. "
            f"Exclude fewer of them: {_examples(candidates)}."
        )
    for name, layer in chosen.items():
        check_finite(weight_of(layer), f"the weight of layer {name!r}")
    return chosen


def weight_of(layer: nn.Module) -> Tensor:
    """The weight (out_features, in_features) of a linear layer; a view, transposed for ``Conv1D``.

    Raises:
        ModelError: if the layer is neither ``nn.Linear`` nor ``Conv1D``.
    """
    if not is_linear(layer):
        raise ModelError(
            f"weight_of was given a {type(layer).__name__}; expected nn.Linear or Conv1D. Take layers from "
            f"select_layers."
        )
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if _is_conv1d(layer) else weight


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an ``nn.Linear``, or a transformers ``Conv1D`` by its class name and ``nf``."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Decoder blocks by full name, in order: the children of the ``ModuleList`` with most linear layers.

    A model without a list that holds more than half of its linear layers, the head aside, is one block under
    the empty name. Of lists that hold equally many, the outermost one counts.
    """
    found = _linears(model, model)
    best, most = {"": model}, len(found) // 2
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            held = sum(1 for linear in found if linear.startswith(f"{name}."))
            if held > most:
                best, most = {f"{name}.{child}": block for child, block in module.named_children()}, held
    return best


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _linears(root: nn.Module, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Linear modules under ``root`` by full name, without the head and what is tied to an embedding."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in root.named_modules(prefix=prefix)
        if is_linear(module) and module is not head and id(module.weight) not in tied
        if name.rpartition(".")[2] != "lm_head"
    }


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    candidates: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for prefix, block in decoder_blocks(model).items():
        for name, layer in _linears(block, model, prefix).items():
            if id(layer.weight) not in seen:
                seen.add(id(layer.weight))
                candidates[name] = layer
    return candidates


def _patterns(patterns: Iterable[str] | None, argument: str) -> Sequence[str] | None:
    if isinstance(patterns, str):
        raise ModelError(
            f"{argument}={patterns!r} is one string; expected several patterns: {argument}=[{patterns!r}]."
        )
    return None if patterns is None else list(patterns)


def _matching(
    candidates: dict[str, nn.Module], patterns: Sequence[str] | None, argument: str, *, default: set[str]
) -> set[str]:
    if patterns is None:
        return default
    matched: set[str] = set()
    for pattern in patterns:
        names = {name for name in candidates if fnmatchcase(name, pattern)}
        if not names:
            raise ModelError(
                f"{argument} pattern {pattern!r} matches none of {len(candidates)} layers; expected a glob "
                f"on full names such as {_examples(candidates)}."
            )
        matched |= names
    return matched


def _examples(candidates: dict[str, nn.Module]) -> str:
    return ", ".join(repr(name) for name in list(candidates)[:4])
