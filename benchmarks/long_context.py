"""SmolLM2-135M on long texts as it is, with HiP and with recycled attention; writes results/long_context.json.

HiP: perplexity of the second half of windows of prose, needles found, and time in attention for a prompt, against the
model's own attention and against a window of as many keys. Recycled: perplexity of teacher-forced steps after a prompt
and the share of the cache that they read, against the whole cache and against first and last tokens of the same number.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from subquad import tasks
from subquad.convert.measures import needle_accuracy
from subquad.inference import hip_attention
from subquad.inference.hip_attention import hip
from subquad.inference.recycled import RecycledLayer, recycle
from subquad.tasks.pretrained_models import pretrained

HIP = {"window": 256, "sinks": 16, "block_q": 64, "query_stride": 4, "shared": True}
PER_CHARACTER = 4.0  # characters of prose per token, at least


def windows(tokenizer: Any, tokens: int, number: int) -> Tensor:
    """``(number, tokens)`` of consecutive prose."""
    data = tasks.prose_text()
    text = "".join(bytes(part).replace(b"\0", b"\n").decode() for part in (data.test, data.valid, data.train))
    ids = tokenizer(text[: 8 * tokens * number], return_tensors="pt").input_ids[0]
    if len(ids) < tokens * number:
        raise ValueError(f"there are {len(ids)} tokens of prose, not {number} windows of {tokens}")
    return ids[: tokens * number].view(number, tokens)


@contextmanager
def timed_attention() -> Iterator[list[float]]:
    """Seconds inside attention functions, added up in the one entry of a list."""
    spent, originals = [0.0], {name: ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", hip_attention.NAME)}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[0] += time.perf_counter() - started
            return result

        return call

    for name, function in originals.items():
        ALL_ATTENTION_FUNCTIONS.register(name, timed(function))
    try:
        yield spent
    finally:
        for name, function in originals.items():
            ALL_ATTENTION_FUNCTIONS.register(name, function)


@contextmanager
def nothing_found() -> Iterator[None]:
    """HiP without its search: sinks and window alone."""
    search = hip_attention.hip_mask

    def none(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        indices, counts = search(*args, **{**options, "budget": options["block_k"]})
        return indices, torch.zeros_like(counts)

    hip_attention.hip_mask = none
    try:
        yield
    finally:
        hip_attention.hip_mask = search


@torch.no_grad()
def prompt_perplexity(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """Of the second half of each window, with the seconds in attention of all windows."""
    half, total = ids.shape[1] // 2, 0.0
    with timed_attention() as spent:
        for row in ids:
            logits = model(row[None], logits_to_keep=half + 1, use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), row[-half:]))
    return {"perplexity": math.exp(total / len(ids)), "attention_seconds": spent[0] / len(ids)}


@torch.no_grad()
def step_perplexity(model: PreTrainedModel, ids: Tensor, steps: int, layer: Callable[[], Any]) -> float:
    """Of the last ``steps`` tokens of each window, read one by one after the others."""
    total = 0.0
    for row in ids:
        cache = Cache(layer_class_to_replicate=layer)
        logits = model(row[None, :-steps], cache=cache, logits_to_keep=1).logits[0, -1]
        for token in row[-steps:]:
            total += float(F.cross_entropy(logits.float()[None], token[None]))
            logits = model(token[None, None], cache=cache).logits[0, -1]
    return math.exp(total / (len(ids) * steps))


def compare_prompts(model: PreTrainedModel, tokenizer: Any, given: argparse.Namespace) -> list[dict[str, Any]]:
    ids, rows = windows(tokenizer, given.tokens, given.windows), []
    for name, budget in [("own attention", None), *((n, b) for b in given.budgets for n in ("HiP", "window"))]:
        options = dict(HIP)
        if name == "HiP":
            options["budget"] = budget
        elif budget is not None:
            options |= {"window": HIP["window"] + budget, "budget": 2}
        with (
            nothing_found() if name == "window" else nullcontext(),
            nullcontext() if budget is None else hip(model, **options),
        ):
            row = {"attention": name, "budget": budget, **prompt_perplexity(model, ids)}
            if given.needles:
                characters = int(0.9 * given.tokens * PER_CHARACTER)
                row["needles"] = needle_accuracy(model, tokenizer, characters, given.needles)
        rows.append(row)
        print(row, flush=True)
    return rows


def compare_steps(model: PreTrainedModel, tokenizer: Any, given: argparse.Namespace) -> list[dict[str, Any]]:
    ids, rows = windows(tokenizer, given.tokens, given.windows), []
    perplexity = step_perplexity(model, ids, given.steps, DynamicLayer)
    rows.append({"cache": "whole", "perplexity": perplexity, "read": 1.0})
    print(rows[-1], flush=True)
    size = given.tokens // 8
    for name, options in (
        ("recycled", {"max_partial": size, "stride": given.stride}),
        ("streaming", {"max_partial": 2 * size, "mode": "streaming"}),
        ("streaming, as many as a partial step", {"max_partial": size, "mode": "streaming"}),
    ):
        counts: list[RecycledLayer] = []

        def new(kept: list[RecycledLayer] = counts) -> RecycledLayer:
            kept.append(RecycledLayer())
            return kept[-1]

        with recycle(model, **options):
            perplexity = step_perplexity(model, ids, given.steps, new)
        read = sum(layer.counts.keys_read for layer in counts) / sum(layer.counts.keys_held for layer in counts)
        rows.append({"cache": name, **options, "perplexity": perplexity, "read": read})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--try", dest="trial", action="store_true", help="print only, write nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    carried = pretrained("smollm2")
    model, tokenizer = carried.load_model(), carried.load_tokenizer()
    results = {
        "command": " ".join(["python", *sys.argv]),
        "hip": {"options": HIP, "rows": compare_prompts(model, tokenizer, given)},
        "recycled": compare_steps(model, tokenizer, given),
    }
    if not given.trial:
        print(machine.write("long_context", results))


if __name__ == "__main__":
    main()
