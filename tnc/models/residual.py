"""Who reads and who writes the residual stream of a decoder with RMS norms (Llama, Mistral, Qwen, Mixtral, ...).

A block has two readings: a norm and the weights behind it, and the weights that write back. Weights are found by
the names that transformers gives them, fused or unfused experts and routers too; anything unknown is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnc.errors import ModelError
from tnc.models.layers import decoder_blocks

READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "gate", "w1", "w3")
WRITERS = ("o_proj", "down_proj", "w2")
_INNER_NORMS = ("q_norm", "k_norm")  # between projection and attention: no part of the stream
_NORMS = {"self_attn": "input_layernorm", "": "post_attention_layernorm"}  # of the attention, of all else


@dataclass(frozen=True, eq=False)
class Reading:
    """A norm and the weights that read what it gives.

    Attributes:
        norm: full name and module; its gain multiplies the features.
        readers: weights (..., d) by full parameter name.
    """

    norm: tuple[str, nn.Module]
    readers: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream of a model.

    Attributes:
        embedding: (vocabulary, d).
        readings: of every block, in order, then the last norm with the head.
        writers: weights (..., d, k) that add to the stream, by full parameter name.
        biases: (..., d) of the writers.
    """

    embedding: nn.Embedding
    readings: tuple[Reading, ...]
    writers: dict[str, Tensor]
    biases: dict[str, Tensor]


def residual_stream(model: nn.Module) -> Stream:
    """The residual stream of a causal language model.

    Raises:
        ModelError: if embedding, head, final norm or blocks are not found, or a parameter has no known role.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    final = next(((k, m) for k, m in model.named_modules() if k.rpartition(".")[2] == "norm" and is_rms(m)), None)
    if not isinstance(embedding, nn.Embedding) or head is None or final is None:
        raise ModelError(
            f"{type(model).__name__} has no embedding, output head and final RMS norm called 'norm'; expected a "
            "Llama-like causal language model of transformers."
        )
    readings: list[Reading] = []
    writers: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for prefix, block in decoder_blocks(model).items():
        attention: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for name, parameter in block.named_parameters():
            role = _role(f"{prefix}.{name}")
            if role == "reader":
                (attention if name.startswith("self_attn.") else rest)[f"{prefix}.{name}"] = parameter
            elif role is not None:
                (writers if role == "writer" else biases)[f"{prefix}.{name}"] = parameter
        readings += [
            _reading(block, prefix, _NORMS["self_attn"], attention), _reading(block, prefix, _NORMS[""], rest),
        ]  # fmt: skip
    last = next(f"{k}.weight" for k, m in model.named_modules() if m is head)
    return Stream(embedding, (*readings, Reading(final, {last: head.weight})), writers, biases)


def is_rms(module: nn.Module) -> bool:
    """Whether the module is called an RMS norm and has a weight and no bias."""
    return "RMSNorm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor)


def gain_of(norm: nn.Module, name: str) -> tuple[Tensor, float]:
    """The gain (d,) of an RMS norm in float64, and what is taken off it where it is stored: 0 or 1.

    The gain is measured on one vector, so that norms which store ``gain - 1`` are understood.

    Raises:
        ModelError: if the gain is neither the weight nor the weight plus 1.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.ones_like(weight)
    x[::2] = -1  # of root mean square 1: the result is the gain, up to epsilon and signs
    with torch.no_grad():
        gain = (norm(x) * x).double()
        for offset in (0.0, 1.0):
            exact = weight.double() + offset
            if torch.allclose(gain, exact, rtol=1e-2, atol=1e-4):
                return exact, offset
    raise ModelError(f"{name} ({type(norm).__name__}) is no RMS norm with a gain per feature; cannot change it.")


def set_gain(norm: nn.Module, gain: Tensor, offset: float) -> None:
    """Store a gain as the norm stores it."""
    assign(norm.weight, gain - offset)  # type: ignore[arg-type]


def assign(parameter: Tensor, value: Tensor) -> None:
    """Write a value into a parameter, in the parameter's dtype."""
    with torch.no_grad():
        parameter.copy_(value)


def _reading(block: nn.Module, prefix: str, norm: str, readers: dict[str, Tensor]) -> Reading:
    module = getattr(block, norm, None)
    if not isinstance(module, nn.Module) or not is_rms(module) or not readers:
        raise ModelError(
            f"block {prefix!r} has no RMS norm {norm!r} with projections behind it; expected a Llama-like block with "
            f"{' and '.join(_NORMS.values())}."
        )
    return Reading((f"{prefix}.{norm}", module), readers)


def _role(name: str) -> str | None:
    """``reader``, ``writer``, ``bias`` (of a writer), or ``None`` for what the stream does not touch."""
    parts = name.split(".")
    if any(part in (*_NORMS.values(), *_INNER_NORMS) for part in parts):
        return None
    bias = parts[-1].endswith("bias")
    kind = next((part.removesuffix("_bias") for part in parts if part.removesuffix("_bias") in READERS + WRITERS), None)
    if kind is None:
        raise ModelError(
            f"parameter {name!r} has no known role in the residual stream; expected norms and projections called "
            f"{', '.join(READERS + WRITERS)}. Rotate the layers one by one with InputRotation instead."
        )
    if bias:
        return "bias" if kind in WRITERS else None
    return "writer" if kind in WRITERS else "reader"


def untie(model: nn.Module) -> bool:
    """Give the head a weight of its own where it shares the embedding's; whether it did."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return True


def same_logits(model: nn.Module, other: nn.Module, tolerance: float) -> float:
    """Largest relative difference of two models' logits on a few random tokens.

    Raises:
        ModelError: if it is above ``tolerance``.
    """
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding.num_embeddings, (1, 12), generator=generator).to(embedding.weight.device)
    with torch.no_grad():
        expected, got = model(tokens).logits.double(), other(tokens).logits.double()
    difference = float((expected - got).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise ModelError(
            f"{type(model).__name__} gives other logits after the change, by {difference:.1e} of the largest; expected "
            "an exact identity for a Llama-like model. Its blocks do more to the residual stream than is known here."
        )
    return difference
