"""What a second thread is worth: ops on one and on two by turns, and torch's attention; writes results/threads.json."""

import sys
from functools import partial
from typing import Any

import machine
import torch

from subquad.bench.kernels import OPS, best_seconds, draw, forward_and_backward, torch_attention

HEADS, WIDTH, ROUNDS = 8, 64, 6
NAMES, LENGTHS = ("lightning_attention", "gla", "delta_rule"), (2048, 8192)


def scaling(length: int) -> list[dict[str, Any]]:
    """Per op and direction, the time with one thread over that with two; the best of ``ROUNDS`` turns each."""
    x = draw(length, HEADS, WIDTH)
    heads_first = {name: x[name].transpose(1, 2).contiguous() for name in ("q", "k", "v")}
    functions = {**{name: (OPS[name], x) for name in NAMES}, "torch's attention": (torch_attention, heads_first)}
    rows = []
    for backward in (False, True):
        best: dict[tuple[str, int], float] = {}
        for _ in range(ROUNDS):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for name, (function, inputs) in functions.items():
                    run = forward_and_backward(function, inputs) if backward else partial(function, inputs)
                    with torch.set_grad_enabled(backward):
                        best[name, threads] = min(best.get((name, threads), float("inf")), best_seconds(run, repeats=1))
        rows += [
            {
                "op": name,
                "time": length,
                "backward": backward,
                "seconds": {str(threads): best[name, threads] for threads in (1, 2)},
                "speedup": best[name, 1] / best[name, 2],
            }
            for name in functions
        ]
    return rows


def main() -> None:
    rows = [row for length in LENGTHS for row in scaling(length)]
    for row in rows:
        print(row)
    print(machine.write("threads", {"command": " ".join(["python", *sys.argv]), "rows": rows}))


if __name__ == "__main__":
    main()
