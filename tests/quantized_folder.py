"""A folder as GPTQ tools write it, packed by arithmetic of its own."""

import json

import torch
from safetensors.torch import save_file

import tnc
from tnc.models.layers import select_layers, weight_of


def words(codes, bits=4):
    """Rows of codes as int32 words, by arithmetic of its own."""
    per_word = 32 // bits
    packed = (codes.long().unflatten(1, (-1, per_word)) << (bits * torch.arange(per_word))).sum(-1)
    return packed.to(torch.uint32).view(torch.int32)


def gptq_folder(model, path, *, group=16, drop=()):
    """A folder as GPTQ tools write it (v2), of rounded weights; attention layers only, and all other tensors."""
    state = dict(model.state_dict())
    for name, layer in select_layers(model, include=["*self_attn*"]).items():
        term = tnc.rtn(weight_of(layer).detach(), tnc.IntFormat(4, group))
        del state[f"{name}.weight"]
        parts = {
            "qweight": words(term.integer_codes()).T.contiguous(), "scales": term.scale.T.contiguous(),
            "qzeros": words(term.zeros().T.contiguous()), "g_idx": (torch.arange(term.shape[1]) // group).int(),
        }  # fmt: skip
        state |= {f"{name}.{k}": t for k, t in parts.items() if k not in drop}
    path.mkdir()
    save_file({k: t.contiguous() for k, t in state.items()}, path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}}
    (path / "config.json").write_text(json.dumps(config))
    return path
