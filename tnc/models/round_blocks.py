"""`round_blocks`: codes and scales of all layers of a block learnt together, against the output of the block.

AutoRound (arXiv:2309.05516): signed gradient descent on a shift of every entry before rounding and on the scales, here
of any operator with one quantized base: rotations around it and factors beside it stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnc.decompose import measure
from tnc.decompose.peel import leaves, peel
from tnc.errors import ModelError
from tnc.formats import TrellisFormat
from tnc.metric import Metric
from tnc.models.blocks import BlockCall, BlockWalk, quiet, run_block
from tnc.models.layers import weight_of
from tnc.models.sequences import Batch, SequenceBatch, read_sequences
from tnc.modules import FactoredLinear
from tnc.quant.descent import Descent, Schedule
from tnc.stats import LayerStats
from tnc.terms import Dense, Expression, Product, Quantized, Sum, dense64, map_tensors

Progress = Callable[[str, int, int], None]
_CHECKS = 10  # times the codes as stored are measured on all held-out sequences of a block


@dataclass(frozen=True)
class BlockRounding:
    """What happened to one block.

    Attributes:
        layers: names of the layers that were learnt.
        before, after: squared error of the block's output over that output, on held-out sequences.
    """

    layers: tuple[str, ...]
    before: float
    after: float


def round_blocks(
    model: nn.Module, batches: Iterable[Batch], *, teacher: nn.Module, stats: Mapping[str, LayerStats] | None = None,
    steps: int = 200, rate: float | None = None, heldout_share: float = 0.1, seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, BlockRounding]:  # fmt: skip
    """Learn the codes of a compressed model in place, block by block; no block gets worse.

    Block k sees the hidden states behind the compressed blocks before it, and aims at the output of the dense one on
    the dense hidden states. Of the codes as stored those with the least error on held-out sequences are kept, the
    given ones among them.

    Args:
        model: with `FactoredLinear` layers, from `tnc.compress`; their scalar bases are learnt, trellises stay.
        batches: token ids (sequences, tokens), or dicts with ``input_ids`` and ``attention_mask``. A step takes one
            of them.
        teacher: the dense model, on the same device; not changed.
        stats: layer statistics for the new reports; without them errors are in the Frobenius norm.
        steps: of every block.
        rate: of the first step, see `tnc.quant.autoround`; ``None`` is ``1 / steps``.
        heldout_share: share of the sequences that choose; without any all of them do.
        seed: of the order of the batches.
        progress: called with (stage, done, total).

    Returns:
        Block name to its errors; blocks without learnable layers are left out.

    Raises:
        ModelError: if no layer can be learnt, or the teacher's layers differ.
        FormatError: for negative steps, or a rate that is not positive.
        StatsError, ShapeError: as `calibrate` for the batches.

    Cost: a step is a forward and backward pass of a block; hidden states of all tokens are kept twice.
    Source: SignRound / AutoRound (arXiv:2309.05516, equations 3 to 6). It starts from the given codes, not from
    nearest ones, keeps zero points, and takes one batch a step in the place of 8 random sequences.
    """
    schedule = Schedule.of("round_blocks", steps, rate)
    layers = _learnable(model, teacher)
    sequences = read_sequences(batches, heldout_share)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, BlockRounding] = {}
    with quiet(model), quiet(teacher):
        walk = BlockWalk(teacher, sequences[0].ids)
        with torch.no_grad():
            calls = [walk.calls(each.ids) for each in sequences]
        states = _States([each[0].hidden for each in calls], [each[0].hidden for each in calls], sequences)
        for index, name in enumerate(walk.blocks):
            block = model.get_submodule(name)
            inner = {id(module) for module in block.modules()}
            own = {layer: each for layer, each in layers.items() if id(each.module) in inner}
            at = [each[index] for each in calls]
            with torch.no_grad():
                states.dense = [walk.run(index, h, call) for h, call in zip(states.dense, at, strict=True)]
            if own:
                start = time.perf_counter()
                problem = _Problem(block, at, states, generator)
                result, chosen = problem.solve(own, schedule)
                seconds = (time.perf_counter() - start) / len(own)
                found[name] = result
                for layer, term in chosen.items():
                    own[layer].install(term, None if stats is None else stats.get(layer), result, seconds)
            with torch.no_grad():
                states.given = [run_block(block, h, call) for h, call in zip(states.given, at, strict=True)]
            if progress is not None:
                progress("round blocks", index + 1, len(walk.blocks))
    return found


@dataclass
class _States:
    """Hidden states, a batch each: behind compressed blocks, behind dense ones, and which sequences they are of."""

    given: list[Tensor]
    dense: list[Tensor]
    sequences: Sequence[SequenceBatch]

    def numbers(self, *, heldout: bool) -> list[int]:
        """Batches that are held out, or that are not; all where there are none of the sort."""
        chosen = [i for i, each in enumerate(self.sequences) if each.heldout == heldout]
        return chosen or list(range(len(self.sequences)))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer whose base can be learnt: what the base should stand for, inside the wrappings."""

    module: FactoredLinear
    operator: Expression
    base: Quantized
    target: Tensor
    weight: Tensor

    def with_base(self, base: Expression) -> Expression:
        return _replaced(self.operator, self.base, base)

    def install(self, base: Quantized, stats: LayerStats | None, result: BlockRounding, seconds: float) -> None:
        """Put the learnt base into the module, and measure again."""
        operator = self.with_base(base)
        tensors = {name.replace(".", "_"): tensor for name, tensor in operator.tensors().items()}
        self.module.load_state_dict(self.module.state_dict() | tensors)
        before = self.module.report or {}
        report = measure(self.weight, operator, stats, damping=before.get("damping"),
                         fallbacks=tuple(before.get("fallbacks", ())))  # fmt: skip
        said = f"rounded against its block: squared error {result.before:.6f} -> {result.after:.6f} of the output"
        self.module.report = replace(
            report, seconds=before.get("seconds", 0.0) + seconds, fallbacks=tuple(dict.fromkeys(report.fallbacks)),
            choices=(*before.get("choices", ()), said),
        ).to_json()  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Problem:
    """One block: its inputs, what its outputs should be, and how it is called."""

    block: nn.Module
    calls: Sequence[BlockCall]
    states: _States
    generator: torch.Generator

    def error(
        self, layers: Mapping[str, _Layer], values: Mapping[str, Expression], batch: int
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the block's output with other bases in its layers, and that output's square."""
        target = self.states.dense[batch].float()
        with _standing_in({each.module: each.with_base(values[name]) for name, each in layers.items()}):
            output = run_block(self.block, self.states.given[batch], self.calls[batch])
        return (output.float() - target).square().sum(), target.square().sum()

    def heldout(self, layers: Mapping[str, _Layer], terms: Mapping[str, Expression]) -> float:
        with torch.no_grad():
            parts = [self.error(layers, terms, batch) for batch in self.states.numbers(heldout=True)]
        return float(sum(e for e, _ in parts)) / max(float(sum(size for _, size in parts)), 1e-300)

    def solve(self, layers: Mapping[str, _Layer], schedule: Schedule) -> tuple[BlockRounding, dict[str, Quantized]]:
        """The best bases on the way."""
        descents = {name: Descent.of(each.target.float(), each.base) for name, each in layers.items()}
        best = {name: each.base for name, each in layers.items()}
        before = least = self.heldout(layers, best)
        batches, every = self.states.numbers(heldout=False), max(1, schedule.steps // _CHECKS)
        for step in range(schedule.steps):
            batch = batches[int(torch.randint(len(batches), (), generator=self.generator))]
            self._step(layers, descents, batch, schedule.at(step))
            if (step + 1) % every == 0 or step + 1 == schedule.steps:
                terms = {name: each.stored() for name, each in descents.items()}
                error = self.heldout(layers, terms)
                if error < least:
                    best, least = terms, error
        return BlockRounding(tuple(layers), before, least), best

    def _step(self, layers: Mapping[str, _Layer], descents: Mapping[str, Descent], batch: int, rate: float) -> None:
        proposed = {name: each.values() for name, each in descents.items()}
        values = {name: chosen.clone().requires_grad_() for name, (chosen, _) in proposed.items()}
        with torch.enable_grad():
            error, _ = self.error(layers, {name: Dense(value) for name, value in values.items()}, batch)
            slopes = torch.autograd.grad(error, list(values.values()), allow_unused=True)
        for (name, (chosen, inside)), slope in zip(proposed.items(), slopes, strict=True):
            if slope is not None:  # an expert that no token of the batch reaches
                descents[name].learn(chosen, inside, -slope, rate)


def _learnable(model: nn.Module, teacher: nn.Module) -> dict[str, _Layer]:
    """Layers with one base of scalar codes, seen without their wrappings."""
    modules = dict(teacher.named_modules())
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, FactoredLinear):
            continue
        if name not in modules:
            raise ModelError(f"the teacher has no layer {name!r}; expected the dense model that was compressed.")
        weight, operator = weight_of(modules[name]).detach(), map_tensors(module.operator, torch.detach)
        inner = peel(weight, operator, Metric())
        bases = [] if inner is None else [t for t in leaves(operator) if isinstance(t, Quantized)]
        if inner is None or len(bases) != 1 or isinstance(bases[0].format, TrellisFormat):
            continue
        others = [dense64(term) for term in leaves(operator) if term is not bases[0]]
        target = inner.weight - sum(others, torch.zeros_like(inner.weight))
        found[name] = _Layer(module, operator, bases[0], target, weight)
    if not found:
        raise ModelError(
            "round_blocks found no layer with one quantized base of scalar codes; expected a model from "
            'tnc.compress, for example with tnc.recipe("gptq", bits=3). Trellises are coded as a whole.'
        )
    return found


def _replaced(operator: Expression, old: Expression, new: Expression) -> Expression:
    if operator is old:
        return new
    if isinstance(operator, Sum | Product):
        return type(operator)(tuple(_replaced(term, old, new) for term in operator.terms))
    return operator


@contextmanager
def _standing_in(operators: Mapping[FactoredLinear, Expression]) -> Iterator[None]:
    """Modules compute with other operators while inside."""

    def forward_of(module: FactoredLinear, operator: Expression) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = operator.linear(x)
            return y if module.bias is None else y + module.bias.to(y.dtype)

        return forward

    try:
        for module, operator in operators.items():
            module.__dict__["forward"] = forward_of(module, operator)
        yield
    finally:
        for module in operators:
            module.__dict__.pop("forward", None)


def not_rounded(report: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's report with a note that its block was not rounded."""
    note = "no batches: codes as they are, not learnt against the block's output"
    return {**report, "fallbacks": [*report["fallbacks"], note]}
