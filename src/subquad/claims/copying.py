"""A small model that copies, for claims about decoding: writing the second half moves what it looks at, token by token.

A sequence is P distinct symbols of 64, a separator, and the same P symbols. The model is an ordinary Llama of
transformers, so that what is tested is what users have.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SYMBOLS, SEPARATOR, LONGEST = 64, 64, 48
LENGTHS = (8, 12, 16, 24, 32, 48)
STEPS, BATCH, LEARNING_RATE = 800, 32, 3e-3
#: Longest copies so far: each cap for so many steps, the last one to the end.
CAPS, STEPS_PER_CAP = (12, 16, 24, 32, 48), 80


def sequences(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``(batch, 2 length + 1)`` ids."""
    symbols = torch.rand(batch, SYMBOLS, generator=generator).argsort(1)[:, :length]
    return torch.cat([symbols, torch.full((batch, 1), SEPARATOR), symbols], 1)


def held_out(batch: int, length: int = LONGEST) -> Tensor:
    """The same for every seed of a model."""
    return sequences(batch, length, torch.Generator().manual_seed(10**6))


def untrained(seed: int) -> LlamaForCausalLM:
    """Two layers of width 64, 4 heads, rotary positions; embeddings of variance 1, all else as torch begins."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SYMBOLS + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    nn.init.normal_(model.model.embed_tokens.weight)
    return model


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a fifth warm-up, constant to the half, then linear to 2%."""
    warmup, half = steps // 5, steps // 2
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < half else 1 - 0.98 * (step - half) / (steps - half)


@functools.cache
def copying_model(seed: int, steps: int = STEPS) -> LlamaForCausalLM:
    """A model trained on copies that grow longer; the same object for the same arguments."""
    model = untrained(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        length = CAPS[min(step * STEPS // steps // STEPS_PER_CAP, len(CAPS) - 1)]
        if torch.rand((), generator=generator).item() < 0.5:
            length = min(length, LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))])
        ids = sequences(BATCH, length, generator)
        logits = model(ids[:, :-1]).logits[:, length:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, length + 1 :].flatten())
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def forced_accuracy(model: LlamaForCausalLM, ids: Tensor, visible: Tensor | None = None) -> float:
    """Of the copied half, each symbol after the true ones; under ``visible (T, T)`` bool, or the model's own mask."""
    length = ids.shape[1] // 2
    mask = None if visible is None else visible.expand(len(ids), 1, -1, -1)
    found = model(ids[:, :-1], attention_mask=mask, use_cache=False).logits[:, length:].argmax(-1)
    return float((found == ids[:, length + 1 :]).double().mean())


@torch.no_grad()
def written_accuracy(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Of the copied half, written by the model from the first half alone, greedily."""
    length = ids.shape[1] // 2
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    prompt = ids[:, : length + 1]
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, length + 1 :]
    return float((found == ids[:, length + 1 :]).double().mean())
