"""Texts that a language model writes: sampled after a prompt, cut at their end."""

from collections.abc import Sequence
from typing import Any

import torch


def padding_token(tokenizer: Any) -> int | None:
    """What ``generate`` fills ended rows with: the padding token, else the one that ends a text, else None."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return None if token is None else int(token)


@torch.no_grad()
def sample_texts(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    number: int,
    max_new_tokens: int,
    logits_processors: Sequence[Any] = (),
) -> tuple[list[list[int]], int]:
    """Token ids of ``number`` sampled texts, the prompt included, each up to its first end token; and its length.

    Args:
        model, tokenizer: of transformers.
        prompt: what all texts begin with.
        number: texts.
        max_new_tokens: after the prompt.
        logits_processors: see ``generate``.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=max_new_tokens,
        num_return_sequences=number,
        pad_token_id=padding_token(tokenizer),
        logits_processor=list(logits_processors),
    )
    start = inputs["input_ids"].shape[1]
    return [_until_end(row, start, tokenizer.eos_token_id) for row in output.tolist()], start


def _until_end(tokens: list[int], start: int, end: int | None) -> list[int]:
    for place in range(start, len(tokens)):
        if tokens[place] == end:
            return tokens[: place + 1]
    return tokens
