"""Every op on a GPU beside torch's attention, and beside flash-linear-attention where it can be imported.

Writes ``results/<device>.json``. ``PYTHONPATH=.peers python benchmarks/gpu.py`` after ``make peers`` includes the peer.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import machine
import torch
from torch import Tensor

from subquad.bench.kernels import OPS, best_seconds, draw, forward_and_backward, kernel_timings

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
HEADS, WIDTH = 16, 128


def peers() -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """flash-linear-attention's chunked kernels under our op's names; none where the package is not at hand."""
    if importlib.util.find_spec("fla") is None:
        return {}
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    return {
        "gla": lambda x: chunk_gla(x["q"], x["k"], x["v"], x["gate"])[0],
        "simple_gla": lambda x: chunk_simple_gla(x["q"], x["k"], x["v"], x["head_gate"])[0],
        "delta_rule": lambda x: chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"])[0],
        "gated_delta_rule": lambda x: chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["head_gate"], x["beta"])[0],
    }


def beside_peers(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Ours and the peer's seconds in one run, and the largest difference of their outputs."""
    rows = []
    for name, peer in peers().items():
        for length in LENGTHS:
            x = draw(length, HEADS, WIDTH, "cuda", dtype)
            with torch.no_grad():
                ours, theirs = OPS[name](x).float(), peer(x).float()
                difference = float((ours - theirs).abs().max() / theirs.abs().max())
                forward = [best_seconds(lambda f=f, x=x: f(x), "cuda") for f in (OPS[name], peer)]
            both = [best_seconds(forward_and_backward(f, x), "cuda") for f in (OPS[name], peer)]
            row = {"op": name, "time": length, "largest_relative_difference": difference}
            row |= {"forward_seconds": forward[0], "peer_forward_seconds": forward[1]}
            row |= {"both_seconds": both[0], "peer_both_seconds": both[1]}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: benchmarks/ops.py is the benchmark for a CPU")
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "dtype": "bfloat16"}
    timings = kernel_timings(
        lengths=LENGTHS,
        heads=HEADS,
        width=WIDTH,
        device="cuda",
        dtype=torch.bfloat16,
        longest_attention=65_536,
        on_result=lambda timing: print(timing.record(), flush=True),
    )
    results["timings"] = [timing.record() for timing in timings]
    results["peers"] = beside_peers(torch.bfloat16)
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    print(machine.write(name, results))


if __name__ == "__main__":
    main()
