"""Layers whose cost per token must not grow: forward and backward at 2,048 and 16,384 tokens, beside torch's attention.

Also the neural memory's chunk form beside its definition, one token after another. Writes results/long_sequences.json.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import mixers, ops
from subquad.bench.kernels import PEER, best_seconds, draw, forward_and_backward, torch_attention

HEADS, WIDTH, TAYLOR_KEYS = 8, 64, 16
SHORT, LONG = 2048, 16_384
ROUNDS = 3
SEQUENTIAL_LENGTH = 2048


def aaren(x: dict[str, Tensor]) -> Tensor:
    """Aaren's op reads scores of one learnt query per head."""
    return ops.prefix_attention(x["k"].sum(-1), x["v"])[0]


def flow(x: dict[str, Tensor]) -> Tensor:
    return ops.flow_attention(x["q"].sigmoid(), x["k"].sigmoid(), x["v"])[0]


def taylor(x: dict[str, Tensor]) -> Tensor:
    return ops.taylor_linear_attention(x["q"][..., :TAYLOR_KEYS], x["k"][..., :TAYLOR_KEYS], x["v"])[0]


def routed_memories(x: dict[str, Tensor], mixer: torch.nn.Module) -> Tensor:
    """The whole mixer, projections included: its op has no meaning without the router."""
    output: Tensor = mixer(x["v"].flatten(-2)).output
    return output


def layers() -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    mom = mixers.build("mom", HEADS * WIDTH, num_heads=HEADS)
    routed = partial(routed_memories, mixer=mom)
    return {"aaren": aaren, "flow": flow, "taylor_linear": taylor, "mom (whole mixer)": routed}


def growth() -> list[dict[str, Any]]:
    """Seconds of both directions at the two lengths, all taking turns; torch's attention gets contiguous heads."""
    functions = layers()
    seconds: dict[tuple[str, int], float] = {}
    for _ in range(ROUNDS):
        for time in (SHORT, LONG):
            x = draw(time, HEADS, WIDTH)
            heads_first = {name: x[name].transpose(1, 2).contiguous() for name in ("q", "k", "v")}
            for name, function in {PEER: torch_attention, **functions}.items():
                taken = best_seconds(forward_and_backward(function, heads_first if name == PEER else x), repeats=2)
                seconds[name, time] = min(taken, seconds.get((name, time), taken))
    return [
        {
            "layer": name,
            "threads": torch.get_num_threads(),
            "seconds_short": seconds[name, SHORT],
            "seconds_long": seconds[name, LONG],
            "growth_of_time_per_token": seconds[name, LONG] / LONG / (seconds[name, SHORT] / SHORT),
            "attention_ratio_long": seconds[PEER, LONG] / seconds[name, LONG],
        }
        for name in (PEER, *functions)
    ]


def neural_memory(chunk_size: int, heads: int = 4, width: int = 32, expansion: int = 4) -> dict[str, Any]:
    """The chunk form beside the definition with the same chunks, forward, a memory of two layers."""
    generator = torch.Generator().manual_seed(0)
    rows = (1, SEQUENTIAL_LENGTH, heads)
    q, k, v = (torch.randn(*rows, width, generator=generator) for _ in range(3))
    forget, momentum, step = (torch.rand(*rows, generator=generator) for _ in range(3))
    shapes = ((heads, width, expansion * width), (heads, expansion * width, width))
    weights = [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes]
    arguments = (q, F.normalize(k, dim=-1), v, 0.1 * forget, 0.5 * momentum, step / (2 * chunk_size), weights)
    run = partial(ops.neural_memory, *arguments, chunk_size=chunk_size)
    with torch.no_grad():
        ours, definition = run(backend="chunked")[0], run(backend="reference")[0]
        seconds = best_seconds(partial(run, backend="chunked"))
        sequential = best_seconds(partial(run, backend="reference"), repeats=1)
    return {
        "time": SEQUENTIAL_LENGTH,
        "chunk_size": chunk_size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "sequential_ratio": sequential / seconds,
        "largest_relative_difference": float((ours - definition).abs().max() / definition.abs().max()),
    }


def main() -> None:
    torch.set_num_threads(1)
    results = {
        "command": " ".join(["python", *sys.argv]),
        "lengths": [SHORT, LONG],
        "growth": growth(),
        "neural_memory": [neural_memory(16), neural_memory(64)],
    }
    for row in (*results["growth"], *results["neural_memory"]):
        print(row)
    print(machine.write("long_sequences", results))


if __name__ == "__main__":
    main()
