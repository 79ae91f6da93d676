"""What reading a context and writing after it cost: seconds, and bytes of state."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.mixers.contract import named_leaves


@dataclass(frozen=True)
class ContextCost:
    """The cost of one context length, one row at a time.

    Attributes:
        length: tokens read.
        prefill_seconds: one number per repetition: reading the whole context, logits for the last token only.
        decode_seconds: one number per written token, after the context.
        state_bytes: what the cache holds after the context.
    """

    length: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    state_bytes: int


@torch.no_grad()
def context_cost(
    model: Any, length: int, *, decode_tokens: int = 16, repeats: int = 3, enough_seconds: float = 2.0
) -> ContextCost:
    """Reads ``length`` drawn tokens, then writes ``decode_tokens`` more one by one.

    Args:
        model: a causal language model, in evaluation mode, that takes and returns ``cache``.
        length: tokens of the context.
        decode_tokens: tokens written and timed after it.
        repeats: how often the context is read; fewer (at least twice, where so many are asked for) when
            ``enough_seconds`` have passed.
        enough_seconds: time after which reading is not repeated.
    """
    device = next(model.parameters()).device
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    tokens = tokens.to(device)
    wait = _barrier(device)
    prefill: list[float] = []
    began = time.perf_counter()
    while len(prefill) < min(2, repeats) or (len(prefill) < repeats and time.perf_counter() - began < enough_seconds):
        seconds, output = _timed(lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1), wait)
        prefill.append(seconds)
    cache = output.cache
    state_bytes = held_bytes(cache)
    decode: list[float] = []
    token = tokens[:, -1:]
    for _ in range(decode_tokens):
        seconds, (token, cache) = _timed(partial(_step, model, token, cache), wait)
        decode.append(seconds)
    return ContextCost(length, tuple(prefill), tuple(decode), state_bytes)


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors that the layers of a cache hold: keys and values, or a mixer's state."""
    tensors = [
        leaf
        for layer in cache.layers
        for leaf in (
            [leaf for _, leaf in named_leaves(layer.state)]
            if getattr(layer, "state", None) is not None
            else [getattr(layer, "keys", None), getattr(layer, "values", None)]
        )
        if leaf is not None
    ]
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors)


def _step(model: Any, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
    output = model(input_ids=token, cache=cache, use_cache=True)
    return output.logits[:, -1].argmax(-1, keepdim=True), output.cache


def _timed(function: Callable[[], Any], wait: Callable[[], None]) -> tuple[float, Any]:
    wait()
    began = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - began, result


def _barrier(device: torch.device) -> Callable[[], None]:
    """Waits for what an accelerator still computes."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
