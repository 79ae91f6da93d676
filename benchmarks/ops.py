"""Every op beside torch's attention and the peers that run on a CPU, in one process; writes results/ops.json.

``python benchmarks/ops.py`` takes about twenty minutes; ``--quick`` leaves out the long sequences and the peers.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import machine
import plain_steps
import torch
from torch import Tensor

from subquad import mixers, ops
from subquad.bench.kernels import OPS, best_seconds, draw, forward_and_backward, kernel_timings, matrix_product_rate

HEADS, WIDTH = 8, 64
ROUNDS = 3


def transformers_gated_delta_rule(
    lengths: tuple[int, ...] = (2048,), heads: int = 4, width: int = 64
) -> list[dict[str, Any]]:
    """Ours against the two torch fallbacks of transformers' gated-delta models, forward, and the largest difference."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    chunk = _unwrapped(qwen.torch_chunk_gated_delta_rule)
    recurrent = _unwrapped(qwen.torch_recurrent_gated_delta_rule)

    def ours(x: dict[str, Tensor]) -> Tensor:
        return ops.gated_delta_rule(x["q"], x["k"], x["v"], x["head_gate"], x["beta"])[0]

    def theirs(function: Callable[..., Any], x: dict[str, Tensor]) -> Tensor:
        gates = {"g": x["head_gate"], "beta": x["beta"]}
        return function(x["q"], x["k"], x["v"], **gates, initial_state=None, output_final_state=False)[0]

    rows = []
    for length in lengths:
        x = draw(length, heads, width)
        with torch.no_grad():
            seconds = best_seconds(partial(ours, x))
            chunk_seconds = best_seconds(partial(theirs, chunk, x))
            recurrent_seconds = best_seconds(partial(theirs, recurrent, x))
            mine = ours(x)
            error = max(float((theirs(f, x) - mine).abs().max() / mine.abs().max()) for f in (chunk, recurrent))
        rows.append(
            {
                "time": length,
                "heads": heads,
                "width": width,
                "threads": torch.get_num_threads(),
                "seconds": seconds,
                "transformers_chunk_ratio": chunk_seconds / seconds,
                "transformers_recurrent_ratio": recurrent_seconds / seconds,
                "largest_relative_difference": error,
            }
        )
    return rows


def _unwrapped(function: Any) -> Any:
    return getattr(function, "__wrapped__", function)


def token_rates(names: tuple[str, ...] = ("lightning_attention", "gla", "delta_rule")) -> list[dict[str, Any]]:
    """Time per token at 65,536 tokens over that at 8,192: 1 is a cost that does not depend on the length."""
    rows = []
    for name in names:
        for backward in (False, True):
            per_token = {8192: float("inf"), 65_536: float("inf")}
            for _ in range(ROUNDS):
                for length in per_token:
                    x = draw(length, HEADS, WIDTH)
                    run = forward_and_backward(OPS[name], x) if backward else partial(OPS[name], x)
                    with torch.set_grad_enabled(backward):
                        per_token[length] = min(per_token[length], best_seconds(run) / length)
            rows.append({"op": name, "backward": backward, "growth": per_token[65_536] / per_token[8192]})
    return rows


def mixer_steps(dim: int = 256) -> list[dict[str, Any]]:
    """One token through a whole mixer, beside the same layer written straight in torch ops (``plain_steps.py``)."""
    rows = []
    for name, plain_step in plain_steps.STEPS.items():
        mixer = mixers.build(name, dim, num_heads=4).eval()
        x = torch.randn(1, 1, dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            state = mixer(torch.randn(1, 8, dim), use_state=True).state
            step, plain = partial(mixer, x, state=state, use_state=True), partial(plain_step(mixer), x[0], state)
            ours, (output, after) = step(), plain()
            differences = [(ours.output[0], output), (ours.state.state[0], after[0])]
            seconds, plain_seconds = best_seconds(step, repeats=200), best_seconds(plain, repeats=200)
        rows.append(
            {
                "mixer": name,
                "dim": dim,
                "threads": torch.get_num_threads(),
                "seconds": seconds,
                "plain_torch_seconds": plain_seconds,
                "plain_torch_ratio": plain_seconds / seconds,
                "largest_relative_difference": max(float((a - b).abs().max() / b.abs().max()) for a, b in differences),
            }
        )
    return rows


def shares(timings: list[Any], rate: float, chunk: int = 32) -> list[dict[str, Any]]:
    """Share of the BLAS rate: 2 H T (2 C K + 2 K^2) operations forward, C the chunk really used; backward: thrice."""
    rows = []
    for timing in timings:
        if timing.op in ("lightning_attention", "gla", "delta_rule") and timing.threads == 1:
            operations = (3 if timing.backward else 1) * 2 * HEADS * timing.time * (2 * chunk * WIDTH + 2 * WIDTH**2)
            share = operations / timing.seconds / rate
            rows.append({"op": timing.op, "time": timing.time, "backward": timing.backward, "share": share})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="lengths up to 2,048 and no peers")
    arguments = parser.parse_args()
    lengths = (512, 2048) if arguments.quick else (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
    for name in OPS:  # compile outside of every timed region
        forward_and_backward(OPS[name], draw(64, 2, WIDTH))()

    def show(timing: Any) -> None:
        ratio = f"{timing.ratio:6.1f}x" if timing.ratio else "      -"
        direction = "forward + backward" if timing.backward else "forward"
        where = f"{timing.threads} thread  {timing.op:<20} {timing.time:>6} {direction:<19}"
        print(f"{where} {1e3 * timing.seconds:9.2f} ms {ratio}", flush=True)

    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
    torch.set_num_threads(1)
    rate = matrix_product_rate()
    options = {"heads": HEADS, "width": WIDTH, "rounds": ROUNDS, "on_result": show}
    one = kernel_timings(lengths=lengths, threads=1, **options)
    two_lengths = (2048,) if arguments.quick else (2048, 8192)
    two = kernel_timings(lengths=two_lengths, threads=2, **options)
    results["sgemm_1024_flops"] = rate
    results["timings"] = [timing.record() for timing in (*one, *two)]
    results["blas_shares"] = shares(one, rate)
    torch.set_num_threads(1)
    results["mixer_steps"] = mixer_steps()
    if not arguments.quick:
        results["growth_of_time_per_token"] = token_rates()
        results["transformers_gated_delta_rule"] = transformers_gated_delta_rule()
    path = machine.write("ops-quick" if arguments.quick else "ops", results)
    for key in ("blas_shares", "mixer_steps", "growth_of_time_per_token", "transformers_gated_delta_rule"):
        for row in results.get(key, []):
            print(key, row)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
