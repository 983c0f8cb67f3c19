"""QuaRot's rotation of a whole model: outliers are spread before calibration, and nothing runs online."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tnc.errors import ModelError
from tnc.models.residual import Stream, assign, gain_of, residual_stream, same_logits, set_gain, untie
from tnc.terms import Hadamard

_TOLERANCE = 1e-4  # of the largest logit; transformers takes RMS norms in float32 whatever the dtype


def rotate_model(model: nn.Module, seed: int = 0, *, inplace: bool = False) -> nn.Module:
    """The same model with its residual stream, and its values head by head, in a randomly rotated basis.

    The gains of the RMS norms are fused into the weights behind them; then embedding, head and every weight that
    reads or writes the stream are multiplied by one randomised Hadamard rotation, and each head of the values by a
    second one, which the attention's output projection undoes. The logits stay what they were. Calibrate and
    compress the result as any dense model: all layers but the down projections then see rotated inputs without
    storing a rotation, all writers have rotated outputs.

    A head tied to the embedding gets a weight of its own, because the last gain belongs to the head alone: the model
    grows by vocabulary times width, and ``config.tie_word_embeddings`` becomes false.

    Args:
        model: a Llama-like causal language model of transformers (RMS norms before attention and MLP), float32 or
            float64; narrower weights would be rounded once more.
        seed: of the signs.
        inplace: change ``model`` itself; otherwise a copy.

    Raises:
        ModelError: if the model is of another build, is stored in a narrower dtype, or its logits would change by more
            than 1e-4 of the largest.

    Source: QuaRot (arXiv:2404.00456) section 4, without its online rotations of queries, keys and down projections.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ModelError(f"rotate_model got weights in {dtype}; expected float32, which loses nothing: model.float().")
    target = copy.deepcopy(model)
    untie(target)
    stream = residual_stream(target)
    fuse_gains(stream)
    _rotate_stream(stream, seed)
    _rotate_values(target, stream, seed + 1)
    same_logits(model, target, _TOLERANCE)
    if not inplace:
        return target
    untie(model)
    with torch.no_grad():
        for own, rotated in zip(model.parameters(), target.parameters(), strict=True):
            own.copy_(rotated)
    return model


def fuse_gains(stream: Stream) -> None:
    """Multiply the gains of all norms into the weights that read them; in place."""
    for reading in stream.readings:
        gain, offset = gain_of(reading.norm[1], reading.norm[0])
        set_gain(reading.norm[1], torch.ones_like(gain), offset)
        for weight in reading.readers.values():
            assign(weight, weight.double() * gain)


def _rotate_stream(stream: Stream, seed: int) -> None:
    rotation = Hadamard.random(stream.embedding.embedding_dim, seed=seed)
    for reading in stream.readings:
        for weight in reading.readers.values():
            assign(weight, rotation.linear(weight.double()))
    for weight in stream.writers.values():
        assign(weight, rotation.linear(weight.double().mT).mT)
    for vector in (stream.embedding.weight, *stream.biases.values()):
        assign(vector, rotation.linear(vector.double()))


def _rotate_values(model: nn.Module, stream: Stream, seed: int) -> None:
    """Rotate every head of the values; the columns of the output projection undo it."""
    head = _head_size(model, stream)
    rotation = Hadamard.random(head, seed=seed)
    parameters = dict(model.named_parameters())
    for name, weight in parameters.items():
        if name.endswith("self_attn.v_proj.weight"):
            heads = weight.double().reshape(-1, head, weight.shape[1]).mT  # (heads, d, head)
            assign(weight, rotation.linear(heads).mT.flatten(0, 1))
        elif name.endswith("self_attn.v_proj.bias"):
            assign(weight, rotation.linear(weight.double().reshape(-1, head)).flatten())
        elif name.endswith("self_attn.o_proj.weight"):
            assign(weight, rotation.linear(weight.double().reshape(len(weight), -1, head)).flatten(1))


def _head_size(model: nn.Module, stream: Stream) -> int:
    config = model.config
    size = getattr(config, "head_dim", None) or stream.embedding.embedding_dim // config.num_attention_heads  # type: ignore[union-attr, operator]
    return int(size)
