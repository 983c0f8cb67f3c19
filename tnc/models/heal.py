"""`heal`: a short fine-tune of the factors of a compressed model against the dense one.

First every block learns the outputs of its dense counterpart on the dense model's hidden states, all blocks at
once; then the whole model learns the dense model's token distributions (KL, temperature 1). Only floating factors
of `FactoredLinear` layers are trained: cores, left and right factors, couplings. Quantized bases, biases, norms,
embeddings and the head stay as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from tnc.errors import ModelError, check_finite
from tnc.models.factor_adam import FactorAdam
from tnc.models.heal_state import load_state, save_state
from tnc.models.layers import decoder_blocks
from tnc.models.sequences import Batch, read_sequences
from tnc.modules import FactoredLinear

Progress = Callable[[str, int, int], None]
_WARMUP = 0.05  # share of the steps of a phase in which the rate rises
_LAST = 0.1  # share of the rate that is left at the end
_CLIP = 1.0  # largest norm of a gradient


@dataclass(frozen=True)
class HealReport:
    """What a fine-tune did.

    Attributes:
        trained: numbers that were trainable.
        losses: phase -> loss at every step: ``blocks`` in squared output error relative to the dense block's
            output, mean over blocks; ``logits`` in nats of KL a token.
        resumed_at: steps that an earlier run had finished.
        seconds: wall time of this run.
    """

    trained: int
    losses: dict[str, list[float]]
    resumed_at: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def heal(
    model: nn.Module, batches: Iterable[Batch], *, teacher: nn.Module, block_steps: int = 100, logit_steps: int = 200,
    learning_rate: float = 1e-3, autocast: torch.dtype | None = None, state: str | Path | None = None,
    save_every: int = 50, seed: int = 0, progress: Progress | None = None,
) -> HealReport:  # fmt: skip
    """Fine-tune the factors of ``model`` in place until it is closer to ``teacher``.

    Args:
        model: with `FactoredLinear` layers, from `tnc.compress`; blocks named as in ``teacher``.
        batches: token ids (sequences, tokens), or dicts with ``input_ids`` and ``attention_mask``.
        teacher: the dense model, on the same device; not changed.
        block_steps: steps of matching block outputs; 0 leaves the phase out.
        logit_steps: steps of matching token distributions; 0 leaves the phase out.
        learning_rate: of Adam without weight decay, relative to the root mean square of each factor, after a
            warm-up over 5 % of the steps and down a cosine to a tenth.
        autocast: dtype of the arithmetic on a GPU, for example ``torch.bfloat16``; factors are trained in float32
            and rounded to their stored dtype at the end.
        state: file for resuming: written every ``save_every`` steps, read if it exists, deleted at the end. A run
            that is cut short and started again with the same arguments ends with the same factors, bit for bit on
            one device.
        save_every: steps between two writes of ``state``.
        seed: of the order of the batches.
        progress: called with (phase, done, total).

    Returns:
        Losses and counts.

    Raises:
        ModelError: if there are no factored layers, or the teacher lacks a block, or ``state`` is of another run.
        NonFiniteError: if the loss is no longer a number; the factors of before that step are kept.
        StatsError, ShapeError: as `calibrate` for the batches.

    Cost: a step is a forward and backward pass of ``model`` and a forward pass of ``teacher``; 12 bytes a factor.
    """
    factors = trainable_factors(model)
    blocks = _shared_blocks(model, teacher)
    sequences = [batch.ids for batch in read_sequences(batches, 0.0)]
    start = time.perf_counter()
    plan = {"blocks": block_steps, "logits": logit_steps}
    with ExitStack() as stack:
        for each in (model, teacher):
            stack.enter_context(_frozen(each))
        stack.enter_context(_wide(factors))
        run = _Run(factors, plan, learning_rate, len(sequences), seed, None if state is None else Path(state))
        resumed = run.done
        for step in range(run.done, sum(plan.values())):
            phase = "blocks" if step < block_steps else "logits"
            batch = sequences[run.order(step)].to(next(iter(factors.values())).device)
            with _arithmetic(batch.device, autocast):
                loss = _block_loss(blocks, teacher, batch) if phase == "blocks" else _logit_loss(model, teacher, batch)
            run.step(phase, step, loss)
            if progress is not None:
                progress(phase, step + 1 - (0 if phase == "blocks" else block_steps), plan[phase])
            if run.file is not None and (step + 1) % save_every == 0:
                run.save()
    if run.file is not None:
        run.file.unlink(missing_ok=True)
    trained = sum(p.numel() for p in factors.values())
    return HealReport(trained, run.losses, resumed, time.perf_counter() - start)


def trainable_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating factors of the `FactoredLinear` layers by full name; no bias, and nothing of a quantized base.

    Raises:
        ModelError: if there are none.
    """
    found = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules() if isinstance(module, FactoredLinear)
        for key, parameter in module.named_parameters(recurse=False) if key != "bias"
    }  # fmt: skip
    if not found:
        raise ModelError(
            f"heal got a {type(model).__name__} without floating factors; expected FactoredLinear layers with cores or "
            "left and right factors. Compress it first: tnc.compress(model, tnc.recipe(...), batches)."
        )
    return found


class _Run:
    """Adam over the factors, its schedule, the order of the batches, and the file they resume from."""

    def __init__(
        self, factors: dict[str, nn.Parameter], plan: dict[str, int], rate: float, batches: int, seed: int,
        file: Path | None,
    ) -> None:  # fmt: skip
        self.factors, self.plan, self.file = factors, plan, file
        self.losses: dict[str, list[float]] = {phase: [] for phase in plan}
        self.done = 0
        self._batches, self._seed = batches, seed
        self._key = {"plan": plan, "rate": rate, "batches": batches, "seed": seed, "factors": sorted(factors)}
        sizes = {name: float(p.detach().square().mean().sqrt()) or 1.0 for name, p in factors.items()}
        if file is not None and file.exists():
            stored = load_state(file, self._key)
            self.done, self.losses, sizes = stored.done, stored.losses, stored.sizes
        self._sizes = sizes
        self.optimizer = FactorAdam(factors, {name: rate * size for name, size in sizes.items()})
        if self.done:
            stored.restore(factors, self.optimizer)

    def order(self, step: int) -> int:
        """The batch of a step: every epoch in an order of its own."""
        epoch, place = divmod(step, self._batches)
        generator = torch.Generator().manual_seed(self._seed + 7919 * epoch)
        return int(torch.randperm(self._batches, generator=generator)[place])

    def step(self, phase: str, step: int, loss: Tensor) -> None:
        """One update of all factors; the loss is waited for once, when all of its arithmetic is under way."""
        for factor in self.factors.values():
            factor.grad = None
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(list(self.factors.values()), _CLIP)
        value = loss.detach().cpu()
        check_finite(value, f"the {phase} loss at step {step} (lower the learning rate)")
        inside = step if phase == "blocks" else step - self.plan["blocks"]
        self.optimizer.step(_schedule(inside, self.plan[phase]))
        self.losses[phase].append(float(value))
        self.done = step + 1

    def save(self) -> None:
        """Write everything a later run needs."""
        assert self.file is not None
        save_state(self.file, self._key, self.done, self.losses, self._sizes, self.factors, self.optimizer)


def _schedule(step: int, total: int) -> float:
    """Share of the learning rate: a linear warm-up, then a cosine down to `_LAST`."""
    warm = max(1, round(_WARMUP * total))
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * share))


def _block_loss(blocks: Sequence[tuple[nn.Module, nn.Module]], teacher: nn.Module, ids: Tensor) -> Tensor:
    """Squared error of every block's output on the teacher's hidden states, relative, mean over blocks."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
    with ExitStack() as stack:
        for k, (_, dense) in enumerate(blocks):
            handle = dense.register_forward_hook(
                lambda _, args, kwargs, output, k=k: calls.__setitem__(k, (args, kwargs, _hidden(output))),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        with torch.no_grad():
            teacher(ids, use_cache=False)
    losses = []
    for k, (small, _) in enumerate(blocks):
        args, kwargs, target = calls[k]
        error = _hidden(small(*args, **kwargs)).float() - target.float()
        change = target.float() - _hidden(args[0] if args else kwargs["hidden_states"]).float()
        losses.append(error.square().mean() / change.square().mean().clamp_min(1e-12))
    return torch.stack(losses).mean()


def _logit_loss(model: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """``KL(teacher ‖ model)``, nats a token."""
    with torch.no_grad():
        target = log_softmax(teacher(ids, use_cache=False).logits.float(), -1).flatten(0, -2)
    logits = log_softmax(model(ids, use_cache=False).logits.float(), -1).flatten(0, -2)
    return kl_div(logits, target, log_target=True, reduction="batchmean")


def _hidden(output: Any) -> Tensor:  # noqa: ANN401
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _shared_blocks(model: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The decoder blocks of both models, paired by name."""
    dense = decoder_blocks(teacher)
    small = dict(model.named_modules())
    missing = [name for name in dense if name not in small]
    if missing:
        raise ModelError(
            f"heal: the model has no block {missing[0]!r}, which the teacher has; expected the same architecture. Pass "
            "the dense model that it was compressed from."
        )
    return [(small[name], block) for name, block in dense.items()]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and nothing trainable, for the time inside."""
    training, wanted = model.training, {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def _wide(factors: dict[str, nn.Parameter]) -> Iterator[None]:
    """Factors trainable in float32 (float64 stays), back in their stored dtype afterwards."""
    stored = {name: p.dtype for name, p in factors.items()}
    for parameter in factors.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in factors.items():
            parameter.grad = None
            parameter.data = parameter.data.to(stored[name])


def _arithmetic(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
