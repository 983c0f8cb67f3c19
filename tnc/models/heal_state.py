"""The file from which a fine-tune resumes: factors, moments of AdamW and losses as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tnc.errors import ModelError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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

    def restore(self, factors: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Put factors and moments back."""
        for name, parameter in factors.items():
            parameter.data.copy_(self.tensors[f"factor/{name}"])
            moments = {key: self.tensors[f"{key}/{name}"] for key in _MOMENTS}
            device = {key: parameter.device if key != "step" else torch.device("cpu") for key in _MOMENTS}
            optimizer.state[parameter] = {key: moments[key].to(device[key]) for key in _MOMENTS}


def save_state(
    file: Path, key: Mapping[str, Any], done: int, losses: Mapping[str, list[float]], sizes: Mapping[str, float],
    factors: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Write the state under a temporary name, then rename: a killed run leaves the old file or the new one."""
    tensors = {f"factor/{name}": p.detach().cpu().contiguous() for name, p in factors.items()}
    for name, parameter in factors.items():
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].detach().cpu().contiguous()
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
