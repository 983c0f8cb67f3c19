"""The file from which a fine-tune resumes: factors, moments of Adam and losses as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tnc.errors import ModelError
from tnc.models.factor_adam import FactorAdam


@dataclass(frozen=True, eq=False)
class HealState:
    """What an earlier run left.

    Attributes:
        done: finished steps.
        losses: phase -> loss at every step so far.
        sizes: root mean square of every factor at the start.
        tensors: factors and moments by name.
    """

    done: int
    losses: dict[str, list[float]]
    sizes: dict[str, float]
    tensors: dict[str, Tensor]

    def restore(self, factors: Mapping[str, nn.Parameter], optimizer: FactorAdam) -> None:
        """Put factors and moments back."""
        for name, mean, square in zip(optimizer.names, optimizer.means, optimizer.squares, strict=True):
            factors[name].data.copy_(self.tensors[f"factor/{name}"])
            mean.copy_(self.tensors[f"mean/{name}"])
            square.copy_(self.tensors[f"square/{name}"])
        optimizer.steps = self.done


def save_state(
    file: Path, key: Mapping[str, Any], done: int, losses: Mapping[str, list[float]], sizes: Mapping[str, float],
    factors: Mapping[str, nn.Parameter], optimizer: FactorAdam,
) -> None:  # fmt: skip
    """Write the state under a temporary name, then rename: a killed run leaves the old file or the new one."""
    tensors = {f"factor/{name}": p.detach().cpu().contiguous() for name, p in factors.items()}
    for name, mean, square in zip(optimizer.names, optimizer.means, optimizer.squares, strict=True):
        tensors |= {f"mean/{name}": mean.cpu().contiguous(), f"square/{name}": square.cpu().contiguous()}
    about = {"key": key, "done": done, "losses": losses, "sizes": sizes}
    partial = file.with_name(f"{file.name}.partial")
    save_file(tensors, partial, metadata={"heal": json.dumps(about)})
    partial.replace(file)


def load_state(file: Path, key: Mapping[str, Any]) -> HealState:
    """The state in a file.

    Raises:
        ModelError: if the file is damaged, or of a run with other arguments, data or factors.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})["heal"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, KeyError, OSError) as error:
        raise ModelError(f"{file} is no state of tnc.heal ({error}); delete it, or name another file.") from error
    if about["key"] != json.loads(json.dumps(key)):
        differs = [name for name in key if about["key"].get(name) != json.loads(json.dumps(key[name]))]
        raise ModelError(
            f"{file} is the state of another run: {', '.join(differs)} differ; expected the same model, batches, "
            "steps, rate and seed. Delete the file, or name another one."
        )
    return HealState(about["done"], about["losses"], about["sizes"], tensors)
