"""Held-out loss of language models, in bits per byte: the unit that does not depend on the tokenizer."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH_TOKENS = 8192  # tokens per forward pass, so that logits stay small at any context


@torch.no_grad()
def bits_per_byte(model: Any, text: Any, split: str = "test", context: int = 512, *, limit: int | None = None) -> float:
    """Mean loss over windows of a held-out split, each window read without what stood before it.

    Args:
        model: a causal language model: ``model(input_ids=...).logits`` is ``(B, T, vocabulary)``.
        text: a :class:`subquad.tasks.TextData`, of bytes or of tokens.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        context: tokens per window.
        limit: at most this many windows, evenly spread over the split; None: all.

    Raises:
        ValueError: the split is shorter than one window.
    """
    total, count = 0.0, 0
    for losses in _losses(model, text, split, context, limit):
        total += float(losses.sum())
        count += losses.numel()
    return total / count * bits_factor(text, split)


@torch.no_grad()
def bits_by_position(
    model: Any, text: Any, split: str, length: int, *, blocks: int, limit: int | None = None
) -> list[float]:
    """Bits per byte within each of ``blocks`` equal stretches of positions of windows of ``length`` tokens.

    A model that keeps using what it has read falls or stays level from stretch to stretch; one that fails beyond the
    length it was trained at rises there.

    Raises:
        ValueError: the split is shorter than one window, or ``blocks`` does not divide ``length``.
    """
    if blocks < 1 or length % blocks:
        raise ValueError(f"blocks must divide length = {length}; got {blocks}")
    total, rows = torch.zeros(length, dtype=torch.float64), 0
    for losses in _losses(model, text, split, length, limit):
        total += losses.sum(0)
        rows += losses.shape[0]
    means: list[float] = (total / rows).unflatten(0, (blocks, -1)).mean(1).tolist()
    factor = bits_factor(text, split)
    return [mean * factor for mean in means]


def bits_factor(text: Any, split: str) -> float:
    """What turns a loss in nats per token of ``split`` into bits per byte."""
    return len(text.tokens(split)) / (text.num_bytes[split] * math.log(2))


def smoothed(values: list[float], points: int) -> list[tuple[int, float]]:
    """A long record as at most ``points`` means of equal stretches: ``(last index + 1, mean)`` each."""
    edges = np.unique(np.linspace(0, len(values), min(points, len(values)) + 1).round().astype(int))
    return [(int(stop), float(np.mean(values[start:stop]))) for start, stop in pairwise(edges)]


def _losses(model: Any, text: Any, split: str, length: int, limit: int | None) -> Any:
    """``(B, length)`` float64 losses in nats, batch after batch, the model in evaluation mode."""
    device = next(model.parameters()).device
    rows = max(1, BATCH_TOKENS // length)
    was_training = isinstance(model, nn.Module) and model.training
    model.eval()
    try:
        for batch in text.eval_windows(split, length, limit, batch_size=rows):
            logits: Tensor = model(input_ids=batch.inputs.to(device), use_cache=False).logits
            losses = functional.cross_entropy(
                logits.flatten(0, 1).float(), batch.labels.to(device).flatten(), reduction="none"
            )
            yield losses.double().cpu().unflatten(0, batch.labels.shape)
    finally:
        model.train(was_training)
