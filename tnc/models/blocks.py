"""Walking a model block by block: the inputs of its blocks, one block alone, the head behind the last one.

A walk calls the model's own forward with blocks bypassed, so that masks, position embeddings and the head are
always the model's. Nothing of the model is copied or rewritten.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnc.errors import ModelError
from tnc.models.layers import decoder_blocks

SAMPLE_TOKENS = 32  # enough to see how a model chains its blocks; attention windows are longer, costs are not


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What a model passes to one block.

    Attributes:
        hidden: the hidden states (sequences, tokens, width); token ids where the model is one block.
        args: the other positional arguments.
        kwargs: the other keyword arguments: mask, position embeddings and so on.
        keyword: the name under which ``hidden`` is passed; ``None`` if it comes first by position.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
        """Split a call into hidden states, the first tensor, and the rest."""
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], kwargs, None)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return cls(value, args, {key: kwargs[key] for key in kwargs if key != name}, name)
        raise ModelError("a decoder block was called without a tensor; expected hidden states as its first one.")


class BlockWalk:
    """The blocks of one model as separate steps.

    ``walk.run`` over all blocks, then ``walk.tail``, equals the model's forward. This is checked on a short
    sample at
    construction: a model that passes more than hidden states from block to block is walked as one single
    block.

    Attributes:
        blocks: by full name, in order; ``{"": model}`` where the model is one block.
    """

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        """Look at the model's blocks with token ids ``sample`` (sequences, tokens); one short forward pass.

        Args:
            model: a causal LM, or any module from token ids (sequences, tokens) to logits.
            sample: its first `SAMPLE_TOKENS` tokens of the first sequence are used.
        """
        self._model = model
        self.blocks = decoder_blocks(model)
        self._modules: Sequence[nn.Module] = list(self.blocks.values())
        self._extras: list[Any] = [None] * len(self._modules)
        with quiet(model), torch.no_grad():
            if not self.whole and not self._chains(sample[:1, :SAMPLE_TOKENS]):
                self.blocks, self._modules, self._extras = {"": model}, [model], [None]

    @property
    def whole(self) -> bool:
        """Whether the model is one single block."""
        return "" in self.blocks

    def calls(self, ids: Tensor) -> list[BlockCall]:
        """What each block is passed for token ids (sequences, tokens); ``hidden`` is true of the first only.

        Cost: the embedding and the mask; no block runs.
        """
        if self.whole:
            return [BlockCall(ids, (), _model_kwargs(self._model), None)]
        calls: list[BlockCall] = []

        def record(index: int, call: BlockCall) -> Tensor:
            calls.append(call)
            if index == len(self._modules) - 1:
                raise _Stop
            return call.hidden

        with self._bypassed(record):
            try:
                self._forward(ids)
            except _Stop:
                return calls
        raise ModelError("the model's forward never reached its last decoder block; expected every block to run once.")

    def run(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Output of block ``index``: hidden states for the next one, logits where the model is one block."""
        return run_block(self._modules[index], hidden, call)

    def tail(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits (sequences, tokens, vocabulary) from the output of the last block: final norm and head."""
        if self.whole:
            return hidden
        last = len(self._modules) - 1
        with self._bypassed(lambda index, call: hidden if index == last else call.hidden):
            return _first_tensor(self._forward(ids))

    def _forward(self, ids: Tensor) -> Any:  # noqa: ANN401
        return self._model(ids, **_model_kwargs(self._model))

    @contextmanager
    def _bypassed(self, replacement: Callable[[int, BlockCall], Tensor]) -> Iterator[None]:
        """Blocks answer ``replacement(index, call)`` in the shape of their own output while inside."""

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                hidden, extras = replacement(index, BlockCall.of(args, kwargs)), self._extras[index]
                return hidden if extras is None else type(extras)((hidden, *extras))

            return forward

        with ExitStack() as stack:
            for index, block in enumerate(self._modules):
                stack.enter_context(_attribute(block, "forward", stand_in(index)))
            yield

    def _chains(self, sample: Tensor) -> bool:
        """Whether hidden states alone go from block to block; learns what blocks return beside them."""
        seen: list[tuple[int, BlockCall, Any]] = []

        def watch(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
                seen.append((index, BlockCall.of(args, kwargs), output))

            return hook

        with ExitStack() as stack:
            for index, block in enumerate(self._modules):
                handle = block.register_forward_hook(watch(index), with_kwargs=True)
                stack.callback(handle.remove)
            self._forward(sample)
        outputs = [output for _, _, output in seen]
        if [index for index, _, _ in seen] != list(range(len(self._modules))):
            return False
        if not all(isinstance(output, (Tensor, tuple, list)) for output in outputs):
            return False
        self._extras = [None if isinstance(output, Tensor) else output[1:] for output in outputs]
        followers = [call.hidden for _, call, _ in seen[1:]]
        if not all(_same(_first_tensor(a), b) for a, b in zip(outputs, followers, strict=False)):
            return False
        bypassed = self.calls(sample)
        return all(
            _same((call.args, call.kwargs), (other.args, other.kwargs))
            for (_, call, _), other in zip(seen, bypassed, strict=True)
        )


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Output of a block for these hidden states, called as the model calls it."""
    hidden = hidden.clone()  # a block may add to its input in place
    if call.keyword is None:
        return _first_tensor(block(hidden, *call.args, **call.kwargs))
    return _first_tensor(block(*call.args, **{call.keyword: hidden}, **call.kwargs))


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients to its parameters while inside; restored on every way out."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


class _Stop(Exception):
    """Leaves the model's forward once the last block is reached."""


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """An instance attribute set while inside; an earlier one, such as an offloading forward, is put back."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def _model_kwargs(model: nn.Module) -> dict[str, Any]:
    """A key-value cache would grow with every call of a block, so it is switched off where there is one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _first_tensor(output: Any) -> Tensor:  # noqa: ANN401
    """The tensor itself, the ``logits``, or the first tensor of a tuple or mapping."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    values = output.values() if isinstance(output, Mapping) else output
    for value in (logits,) if isinstance(logits, Tensor) else values:
        if isinstance(value, Tensor):
            return value
    raise ModelError(
        f"a {type(output).__name__} without a tensor came out of a block; expected hidden states or logits."
    )


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401
    """Equal tensors in equal places; other values count as equal where they have one type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.to(b.device), b)))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)
