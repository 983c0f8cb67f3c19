"""What one calibration walks over: the model's blocks, the selected layers of each, and the token sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tnc.errors import ModelError
from tnc.models.blocks import BlockCall, BlockWalk
from tnc.models.sequences import SequenceBatch

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class CalibrationJob:
    """One calibration: ``groups`` holds the selected layers of each block that has any, in order."""

    model: nn.Module
    walk: BlockWalk
    groups: Mapping[int, Mapping[str, nn.Module]]
    sequences: list[SequenceBatch]
    seed: int
    progress: Progress | None

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return sum(batch.ids.numel() for batch in self.sequences if not batch.heldout)

    def ids(self, batch: SequenceBatch) -> Tensor:
        """Token ids of a batch on the model's device."""
        return _on_device_of(self.model, batch.ids)

    def call(self, batch: SequenceBatch, index: int) -> BlockCall:
        """What block ``index`` is called with on a batch."""
        return self.walk.calls(self.ids(batch))[index]

    def tell(self, stage: str, done: int, total: int) -> None:
        """Report progress, if anybody asked."""
        if self.progress is not None:
            self.progress(stage, done, total)


def calibration_job(
    model: nn.Module, layers: Mapping[str, nn.Module], sequences: list[SequenceBatch], *, seed: int,
    progress: Progress | None,
) -> CalibrationJob:  # fmt: skip
    """The job of one calibration.

    Raises:
        ModelError: for token ids or lengths that the model's configuration rules out.
    """
    _check_fits(model, sequences)
    walk = BlockWalk(model, _on_device_of(model, sequences[0].ids))
    return CalibrationJob(model, walk, _by_block(layers, walk), sequences, seed, progress)


def _by_block(layers: Mapping[str, nn.Module], walk: BlockWalk) -> dict[int, dict[str, nn.Module]]:
    groups: dict[int, dict[str, nn.Module]] = {}
    for index, block in enumerate(walk.blocks):
        inside = {name: layer for name, layer in layers.items() if walk.whole or f"{name}.".startswith(f"{block}.")}
        if inside:
            groups[index] = inside
    return groups


def _check_fits(model: nn.Module, sequences: list[SequenceBatch]) -> None:
    """Raise `ModelError` for token ids or lengths that the model's configuration rules out."""
    config = getattr(model, "config", None)
    vocabulary, limit = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    largest, longest = max(int(s.ids.max()) for s in sequences), max(s.ids.shape[1] for s in sequences)
    smallest = min(int(s.ids.min()) for s in sequences)
    if smallest < 0 or (vocabulary is not None and largest >= vocabulary):
        raise ModelError(
            f"the calibration batches hold token ids {smallest} to {largest}; the model knows 0 <= id < "
            f"{vocabulary}. Use the tokenizer of this model."
        )
    if limit is not None and longest > limit:
        raise ModelError(
            f"calibration sequences of {longest} tokens are longer than the model can read "
            f"(max_position_embeddings={limit}); cut them to at most {limit} tokens."
        )


def _on_device_of(model: nn.Module, ids: Tensor) -> Tensor:
    first = next(model.parameters(), None)
    return ids if first is None else ids.to(first.device)
