"""Tiny random Llama-like models, with gains and biases that are not trivial, and their logits."""

import torch
import transformers

SMALL = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip


def build(family, seed=0, **options):
    """A tiny random model with gains, biases and all that are not trivial."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, seed=1):
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens).logits.double()


def moe(**options):
    return build("Mixtral", num_local_experts=4, num_experts_per_tok=2, **options)
