"""A tiny random model of every family that can be converted."""

import torch

from subquad.convert.sites import FAMILIES

NAMES = list(FAMILIES)
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]
ENCODERS = [name for name, family in FAMILIES.items() if not family.causal]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # weights large enough that attention is not even
}
OWN = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 128},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gpt2": {},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "bert": {},
    "roberta": {"max_position_embeddings": 160},
}


def source(name, seed=0, auto=None, **changes):
    """A random model of a family in evaluation mode: a causal language model, or the bare encoder."""
    family = FAMILIES[name]
    wanted = auto or ("AutoModelForCausalLM" if family.causal else "AutoModel")
    config = family.config_class(**{**SIZES, **OWN[name], **changes})
    torch.manual_seed(seed)
    return getattr(family.modeling, dict(family.models)[wanted])(config).eval()


def tokens(batch=2, time=23, seed=0):
    return torch.randint(3, 97, (batch, time), generator=torch.Generator().manual_seed(seed))


def output_of(model, **inputs):
    """Logits, or an encoder's last hidden states."""
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
