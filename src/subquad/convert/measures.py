"""What a conversion keeps and loses: the same measures of a model before and after, in its own tokens."""

import math
from typing import Any

import numpy as np
import torch

from subquad.evaluation.loss import bits_per_byte
from subquad.evaluation.throughput import context_cost
from subquad.evaluation.writing import padding_token
from subquad.tasks.needle import Needle, answer_matches

NEEDLE_CHARACTERS = (400, 1600)
NEEDLES = 8
REPEATED_TOKENS = 128
REPEATED_ROWS = 8
PROMPT_TOKENS = 48
WRITTEN_TOKENS = 40
SEED = 1_000_003  # of the questions: the same for every model


def quality(model: Any, text: Any, tokenizer: Any, *, context: int, windows: int) -> dict[str, float]:
    """Held-out perplexity and bits per byte, recall of tokens read before, and needles found.

    Args:
        model: a causal language model in evaluation mode.
        text: :class:`subquad.tasks.TextData` in the model's tokens; its test split is read.
        tokenizer: of the model; None: measures that write text are left out.
        context: tokens per window.
        windows: at most so many.
    """
    bits = bits_per_byte(model, text, "test", context, limit=windows)
    nats_per_token = bits * text.num_bytes["test"] * math.log(2) / len(text.tokens("test"))
    figures = {
        "perplexity": math.exp(nats_per_token),
        "bits per byte": bits,
        "recall": repetition_recall(model, text),
    }
    if tokenizer is not None:
        for characters in NEEDLE_CHARACTERS:
            found = needle_accuracy(model, tokenizer, characters)
            if found is not None:
                figures[f"needle at {characters} characters"] = found
    return figures


@torch.no_grad()
def repetition_recall(model: Any, text: Any) -> float:
    """Share of tokens that are the likeliest when a row of up to 128 random tokens of the text is read again.

    No token comes twice in a row, so that nothing but the first reading tells the next one; the first of the second
    reading is not asked for.
    """
    draw, known = np.random.default_rng(SEED), np.unique(text.tokens("test"))
    length = min(REPEATED_TOKENS, _longest(model) // 2, len(known))
    passage = torch.stack(
        [torch.from_numpy(draw.permutation(known)[:length].astype(np.int64)) for _ in range(REPEATED_ROWS)]
    )
    device = next(model.parameters()).device
    ids = torch.cat([passage, passage], 1).to(device)
    right = total = 0
    for row in ids.split(2):
        logits = model(input_ids=row, use_cache=False).logits[:, length:-1]
        right += int((logits.argmax(-1) == row[:, length + 1 :]).sum())
        total += row[:, length + 1 :].numel()
    return right / total


@torch.no_grad()
def needle_accuracy(model: Any, tokenizer: Any, characters: int, number: int = NEEDLES) -> float | None:
    """Share of ``number`` needles found in haystacks of so many characters (:class:`subquad.tasks.Needle`); None: too
    long for the model."""
    device = next(model.parameters()).device
    found = 0
    for prompt, answer in Needle(length=characters).examples(number, seed=SEED, index=0):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        if ids.shape[1] + 12 > _longest(model):
            return None
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=padding_token(tokenizer),
        )
        found += answer_matches(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), answer)
    return found / number


@torch.no_grad()
def continuation(model: Any, text: Any, tokenizer: Any) -> tuple[str, str]:
    """The beginning of the test text, and what the model writes after it, always the likeliest token."""
    ids = torch.from_numpy(text.tokens("test")[None, :PROMPT_TOKENS].astype(np.int64))
    ids = ids.to(next(model.parameters()).device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=WRITTEN_TOKENS,
        do_sample=False,
        pad_token_id=padding_token(tokenizer),
    )
    return tokenizer.decode(ids[0]), tokenizer.decode(output[0, ids.shape[1] :])


def costs(model: Any, contexts: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Seconds to read a context and to write a token after it, and what the cache then holds, by context.

    Contexts beyond the positions that the model knows are left out.
    """
    measured = {}
    for length in contexts:
        if length + 8 > _longest(model):
            continue
        cost = context_cost(model, length, decode_tokens=8, repeats=2, enough_seconds=0.5)
        measured[str(length)] = {
            "prefill seconds": min(cost.prefill_seconds),
            "milliseconds per token": 1e3 * float(np.median(cost.decode_seconds[1:])),
            "state bytes": float(cost.state_bytes),
        }
    return measured


def _longest(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
