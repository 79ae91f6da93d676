"""Every family of transformers with recurrent layers, plain and optimised, in one run; writes results/optimize.json.

Prompts of 1,024 tokens and greedy decoding, in pairs of turns on two threads; random models of width 512. The share of
a prompt's time that the replaced functions take is measured on models of their own, with a clock around each function.

    python benchmarks/optimize.py [FAMILY ...] [--rounds N] [--threads N]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

from subquad import optimize
from subquad.bench.transformers_families import FAMILIES, LARGER, Family
from subquad.inference.optimize import families, seam

PROMPT, START, TOKENS = 1024, 16, 48


class Clock:
    """Seconds inside functions that it wraps; a function that calls another one counts once."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self._inside = False

        return timed


def clocked(model: nn.Module, clock: Clock, *, ours: bool) -> None:
    """Let every function that ``optimize`` would replace, or its replacement, run under the clock."""
    for module in model.modules():
        kind = type(module)
        own = families.LAYERS.get(kind.__name__)
        if own is not None:
            for name, (_, replacement) in own.methods.items():
                seam.bind(module, name, clock.around(replacement if ours else getattr(kind, name)))
            continue
        function = seam.innermost(kind.forward) if hasattr(kind.forward, "__code__") else None
        names = [n for n in families.FUNCTIONS if function is not None and n in function.__code__.co_names]
        names = [n for n in names if n in function.__globals__]
        if names:
            chosen = {n: families.FUNCTIONS[n].ours if ours else function.__globals__[n] for n in names}
            shadow = seam.shadow_of(function.__globals__["__name__"], {n: clock.around(f) for n, f in chosen.items()})
            seam.bind(module, "forward", seam.clone(kind.forward, shadow.__dict__))


@torch.no_grad()
def share(family: Family, ids: torch.Tensor, *, ours: bool) -> float:
    """Of a prompt's time, the part inside the functions that are replaced; the least of three."""
    model, clock, shares = family.build(settings=LARGER), Clock(), []
    clocked(model, clock, ours=ours)
    for turn in range(4):
        clock.seconds, started = 0.0, time.perf_counter()
        model(input_ids=ids)
        if turn:  # the first one compiles
            shares.append(clock.seconds / (time.perf_counter() - started))
    return min(shares)


def measure(family: Family, rounds: int) -> dict[str, Any]:
    """Seconds of a prompt and of a token, plain and ours: medians of alternating turns, and of their ratios."""
    plain, ours = (family.build(settings=LARGER) for _ in range(2))
    done = optimize(ours)
    ids = torch.randint(2, 1024, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    start, mask = ids[:, :START], torch.ones(1, START, dtype=torch.int64)

    def prompt(model: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True)

    def decode(model: Any) -> None:
        model.generate(input_ids=start, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)

    result: dict[str, Any] = {"replaced": [f"{x.kind}: {', '.join(x.ops)}" for x in dict.fromkeys(done.replaced)]}
    for name, run, count in (("prompt", prompt, 1), ("token", decode, TOKENS)):
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for turn in range(rounds + 1):
            for key, model in (("plain", plain), ("ours", ours)):
                started = time.perf_counter()
                run(model)
                if turn:
                    times[key].append((time.perf_counter() - started) / count)
        result[name] = {key: statistics.median(values) for key, values in times.items()}
        result[name]["ratio"] = statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True))
    result["share"] = {"plain": share(family, ids, ours=False), "ours": share(family, ids, ours=True)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    console, results = Console(), {}
    table = Table("Family", "prompt, tokens/s", "", "x", "decoding, tokens/s", "", "x", "share of ops", "")
    for name in arguments.names:
        found = results[name] = measure(FAMILIES[name], arguments.rounds)
        cells = [name]
        for part, tokens in (("prompt", PROMPT), ("token", 1)):
            speeds = [f"{tokens / found[part][key]:,.0f}" for key in ("plain", "ours")]
            cells += [*speeds, f"{found[part]['ratio']:.2f}"]
        cells += [f"{found['share'][key]:.0%}" for key in ("plain", "ours")]
        console.print("  ".join(cells), highlight=False)
        table.add_row(*cells)
    console.print(table)
    if arguments.names == list(FAMILIES):
        settings = {"width": LARGER["hidden_size"], "prompt": PROMPT, "rounds": arguments.rounds}
        path = machine.write("optimize", {"threads": arguments.threads, **settings, "families": results})
        console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
