"""What each compressed layer costs by itself: KL to the dense model with that layer compressed and all others dense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, nn

from tnc.errors import ModelError
from tnc.models.evaluate import evaluate_many
from tnc.models.text import TokenWindows


def scores_alone(
    model: nn.Module, small: nn.Module, groups: Iterable[Sequence[str]], windows: TokenWindows | Iterable[Tensor], *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[float]:  # fmt: skip
    """KL to the dense model, nats per token, of each group of layers compressed alone.

    Args:
        model: dense.
        small: the same model compressed; its layers are taken from here, none is copied.
        groups: names of the layers that are compressed together: one name each, or those of a block, which shows what
            its layers cost together beside what each costs alone.
        windows: held-out token windows.
        progress: called with ("layers", windows done, windows in all).

    Returns:
        One value a group, in order.

    Raises:
        ModelError: for a layer that one of the models lacks.
        TextError: if no window has two tokens.

    Cost: a pass over the windows for each group, and one of the dense model for all.
    """
    variants = {str(at): variant(model, names, partial(_layer, small)) for at, names in enumerate(groups)}
    report = None if progress is None else lambda _, done, total: progress("layers", done, total)
    scores = evaluate_many(variants, windows, reference=model, progress=report)
    return [float(each.kl or 0.0) for each in scores.values()]


def variant(model: nn.Module, names: Iterable[str], layer: Callable[[str], nn.Module]) -> nn.Module:
    """The model with ``layer(name)`` in the place of some layers; every module that does not lie above them is shared.

    Raises:
        ModelError: for a layer that the model lacks.
    """
    root = _shallow(model)
    copied = {"": root}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            path, above = ".".join(parts[:end]), copied[".".join(parts[: end - 1])]
            if path not in copied:
                copied[path] = _shallow(_child(above, parts[end - 1], name))
                above._modules[parts[end - 1]] = copied[path]
        above = copied[".".join(parts[:-1])]
        _child(above, parts[-1], name)
        above._modules[parts[-1]] = layer(name)
    return root


def _layer(small: nn.Module, name: str) -> nn.Module:
    try:
        return small.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the compressed model has no layer {name!r}; pass the result of tnc.compress.") from error


def _child(module: nn.Module, part: str, name: str) -> nn.Module:
    child = module._modules.get(part)
    if child is None:
        raise ModelError(f"the dense model has no layer {name!r}; pass the model that was compressed.")
    return child


def _shallow(module: nn.Module) -> nn.Module:
    """The module with a list of children of its own."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found
