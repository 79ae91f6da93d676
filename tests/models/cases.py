"""A tiny language model per mixer."""

import torch

from subquad import SubquadConfig, SubquadForCausalLM
from tests.mixers.cases import CAUSAL as NAMES
from tests.mixers.cases import OPTIONS

__all__ = ["NAMES", "config", "model", "prompt"]


def config(name, **fields):
    small = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "tie_word_embeddings": False,  # a small mixer under tied embeddings repeats its input
        "initializer_range": 0.2,  # large enough that logits differ and greedy tokens are no accident
    }
    options = {k: v for k, v in OPTIONS.get(name, {}).items() if k != "num_key_value_heads"}
    return SubquadConfig(**{**small, "mixers": {"name": name, **options}, **fields})


def model(name, **fields):
    torch.manual_seed(0)
    return SubquadForCausalLM(config(name, **fields)).eval()


def prompt(length=13, seed=0):
    return torch.randint(1, 50, (1, length), generator=torch.Generator().manual_seed(seed))
